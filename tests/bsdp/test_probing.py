"""Looking inside a model and leaving it as it was."""

import pytest
import torch
from torch import Tensor, nn

from bsdp.probing import as_inputs, evaluating, first_tensor, probe


def mixed() -> nn.Sequential:
    """Modules in different modes."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.BatchNorm1d(3)).train()
    net[1].eval()
    return net


def test_evaluating_restores_modes_gradients_and_random_state() -> None:
    net = mixed()
    state = torch.random.get_rng_state()
    with evaluating(net):
        assert not any(m.training for m in net.modules())
        assert not torch.is_grad_enabled()
        torch.randn(3)
    assert [m.training for m in net.modules()] == [True, True, False, True]
    assert torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_evaluating_restores_modes_that_a_module_would_not_take_from_train() -> None:
    class Frozen(nn.Linear):
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(False)

    net = nn.Sequential(Frozen(3, 3)).train()
    net[0].training = True
    with evaluating(net):
        assert not net[0].training
    assert net[0].training


def test_evaluating_restores_after_an_error() -> None:
    net = mixed()
    with pytest.raises(KeyError), evaluating(net):
        raise KeyError
    assert [m.training for m in net.modules()] == [True, True, False, True]
    assert torch.is_grad_enabled()


def test_probe_sees_inputs_and_outputs_of_every_call_and_changes_nothing() -> None:
    net, inputs = mixed(), torch.randn(2, 3)
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    with probe(net, [net[0], net[2]], lambda m, i, o: seen.append((m, i[0], o))):
        assert not net.training
        output = net(inputs)
        assert not output.requires_grad
        net(inputs)
    assert [m for m, _, _ in seen] == [net[0], net[2]] * 2
    assert torch.equal(seen[0][1], inputs)
    assert torch.equal(seen[1][2], output)
    net(inputs)
    assert len(seen) == 4
    assert not any(m._forward_hooks for m in net.modules())


def test_probe_takes_its_hooks_off_after_an_error() -> None:
    net = mixed()
    with pytest.raises(RuntimeError), probe(net, [net[0]], lambda m, i, o: None):
        net(torch.zeros(2, 7))
    assert not net[0]._forward_hooks
    assert net.training


def test_first_tensor_is_the_first_batch_of_floats_however_deep() -> None:
    images, labels = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    assert first_tensor(images) is images
    assert first_tensor([torch.zeros(4, 2, dtype=torch.long), images]) is images
    assert first_tensor([labels, {"image": images, "other": torch.ones(2, 2)}]) is images
    assert first_tensor((torch.tensor(0.5), torch.zeros(3), (images,))) is images
    assert first_tensor([labels, "text", None]) is None


def test_as_inputs() -> None:
    tensor = torch.zeros(2)
    assert as_inputs(tensor) == (tensor,)
    assert as_inputs([tensor, 3]) == (tensor, 3)
    assert as_inputs((tensor,)) == (tensor,)

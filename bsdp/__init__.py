"""Basis scaling and double pruning: make pretrained vision backbones small and fast while they are transferred.

``import bsdp`` loads torch only. The Lightning callbacks are in `bsdp.callbacks`, the data modules in
`bsdp.datamodules`.
"""

from bsdp.batch_norm_folding import BatchNormFolding, fold_batch_norm
from bsdp.calibration import collect_output_moments, rebase
from bsdp.channel_graph import channel_groups, plan_removal
from bsdp.channel_group import ChannelGroup, UntraceableError
from bsdp.channel_importance import ChannelScores
from bsdp.channel_latency import ChannelLatencyTable, LayerWidths
from bsdp.channel_latency_measuring import measure_channel_latency_table
from bsdp.channel_pruner import ChannelPruner
from bsdp.channel_selection import ChannelCost, ChannelPlan, select_channels
from bsdp.channel_settings import ChannelPruningSettings
from bsdp.channel_surgery import remove_channels
from bsdp.compensated_pruner import CompensatedResult, compensated_prune
from bsdp.compress import CompressionResult, compress
from bsdp.compression_cutting import CompressionTrial
from bsdp.cost import LayerCost, ModelCost, layer_cost
from bsdp.decompose import Decomposition, decompose, pair_from_layer
from bsdp.delta_files import AppliedDelta, load_delta, save_delta
from bsdp.diff_pruning import SparseDelta, attach_deltas, detach_deltas, named_deltas, project_deltas
from bsdp.distillation import Distiller, distillation_loss
from bsdp.double_pruner import DoublePruner, DoublePruningSettings, output_change
from bsdp.export import ExportReport, export
from bsdp.feature_statistics import FeatureStatistics
from bsdp.files import load, read_metadata, save
from bsdp.folding import fold, fold_pair
from bsdp.freezing import fixed_batch_norms, freeze
from bsdp.gradient_moments import collect_gradient_moments
from bsdp.importance import ScoreAccumulator
from bsdp.latency import LatencyTable, LayerLatency
from bsdp.latency_measuring import measure_latency_table
from bsdp.layers import BasisPair, BasisScalingConv, named_pairs
from bsdp.lean_norms import lean_batch_norms
from bsdp.moments import LayerMoment
from bsdp.optimizers import adopt_parameters
from bsdp.plots import plot_pruning_curves
from bsdp.pruner import IterativePruner, PruningSettings
from bsdp.pruning import prune
from bsdp.recalibration import recalibrate_batch_norms
from bsdp.record import PruningRecord, RoundRecord
from bsdp.report import summarize
from bsdp.schedules import kept_share
from bsdp.selection import PruningPlan, select
from bsdp.speed import Speed, SpeedComparison, compare_speed
from bsdp.stats import LayerStats, ModelStats, describe, measure_cost, measure_latency
from bsdp.structural_search import SearchResult, binary_search_with_step_constraint
from bsdp.structure import load_checkpoint, rebuild, structure_of
from bsdp.truncation import truncate_sequentially

__all__ = [
    "AppliedDelta",
    "BasisPair",
    "BasisScalingConv",
    "BatchNormFolding",
    "ChannelCost",
    "ChannelGroup",
    "ChannelLatencyTable",
    "ChannelPlan",
    "ChannelPruner",
    "ChannelPruningSettings",
    "ChannelScores",
    "CompensatedResult",
    "CompressionResult",
    "CompressionTrial",
    "Decomposition",
    "Distiller",
    "DoublePruner",
    "DoublePruningSettings",
    "ExportReport",
    "FeatureStatistics",
    "IterativePruner",
    "LatencyTable",
    "LayerCost",
    "LayerLatency",
    "LayerMoment",
    "LayerStats",
    "LayerWidths",
    "ModelCost",
    "ModelStats",
    "PruningPlan",
    "PruningRecord",
    "PruningSettings",
    "RoundRecord",
    "ScoreAccumulator",
    "SearchResult",
    "SparseDelta",
    "Speed",
    "SpeedComparison",
    "UntraceableError",
    "adopt_parameters",
    "attach_deltas",
    "binary_search_with_step_constraint",
    "channel_groups",
    "collect_gradient_moments",
    "collect_output_moments",
    "compare_speed",
    "compensated_prune",
    "compress",
    "decompose",
    "describe",
    "detach_deltas",
    "distillation_loss",
    "export",
    "fixed_batch_norms",
    "fold",
    "fold_batch_norm",
    "fold_pair",
    "freeze",
    "kept_share",
    "layer_cost",
    "lean_batch_norms",
    "load",
    "load_checkpoint",
    "load_delta",
    "measure_channel_latency_table",
    "measure_cost",
    "measure_latency",
    "measure_latency_table",
    "named_deltas",
    "named_pairs",
    "output_change",
    "pair_from_layer",
    "plan_removal",
    "plot_pruning_curves",
    "project_deltas",
    "prune",
    "read_metadata",
    "rebase",
    "rebuild",
    "recalibrate_batch_norms",
    "remove_channels",
    "save",
    "save_delta",
    "select",
    "select_channels",
    "structure_of",
    "summarize",
    "truncate_sequentially",
]

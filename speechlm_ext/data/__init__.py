"""From a manifest to packed batches: read, tokenize, plan, load."""

from speechlm_ext.data.batch import Sample, SequencePacker
from speechlm_ext.data.manifest import Rejected, Utterance, read_manifest, scan_manifest
from speechlm_ext.data.plan.plan import PackPlan, PlanConfig
from speechlm_ext.data.samples import SampleTable, TaskUse
from speechlm_ext.data.sequence import LossWeights, sequence_length
from speechlm_ext.data.tokens.folder import TokenCorpus, TokenFolder

__all__ = [
    "LossWeights",
    "PackPlan",
    "PlanConfig",
    "Rejected",
    "Sample",
    "SampleTable",
    "SequencePacker",
    "TaskUse",
    "TokenCorpus",
    "TokenFolder",
    "Utterance",
    "read_manifest",
    "sequence_length",
    "scan_manifest",
]

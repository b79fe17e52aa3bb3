"""Shards, and the stream of batches that is read from them."""

from nepa_scale.data.bad_samples import DataError
from nepa_scale.data.batch import Batch, normalize
from nepa_scale.data.shard_set import BadSample, RawSample, ShardSet
from nepa_scale.data.stream import EvaluationStream, TrainStream

__all__ = [
    "BadSample",
    "Batch",
    "DataError",
    "EvaluationStream",
    "RawSample",
    "ShardSet",
    "TrainStream",
    "normalize",
]

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from types import SimpleNamespace

from prometheus_client import generate_latest

from dynamo_epd.metrics import Metrics


def test_every_metric_is_there_under_its_name_and_labels():
    metrics = Metrics("space", "Stage", "model")
    requests, tokens, stage = metrics.requests(), metrics.tokens(), metrics.stage()
    arena = SimpleNamespace(
        transfer_bytes=4096,
        transfers=2,
        transfer_failures=2,
        transfer_seconds=0.5,
        digest_failures=1,
        bytes_used=64,
        leases=5,
        leases_expired=6,
        hits=7,
        misses=8,
    )
    metrics.watch_arena(lambda: arena, cache=True)
    requests.duration.observe(0.2)
    requests.count(200)
    tokens.first_token.observe(0.1)
    tokens.inter_token.observe(0.01)
    with stage.visit() as visit:
        visit.waited = 0.3
        assert re.search(r"(?m)^epd_stage_queue_depth\{.*\} 1\.0$", generate_latest().decode())
    metrics.batch_size().observe(4)
    metrics.restarts(3)
    text = generate_latest().decode()
    labels = 'dynamo_component="Stage",dynamo_namespace="space",model="model"'
    for name, value in {
        "epd_request_duration_seconds_sum": 0.2,
        "epd_time_to_first_token_seconds_sum": 0.1,
        "epd_inter_token_latency_seconds_sum": 0.01,
        "epd_stage_queue_depth": 0.0,
        "epd_stage_queue_seconds_sum": 0.3,
        "epd_stage_run_seconds_count": 1.0,
        "epd_stage_run_seconds_sum": 0.0,  # it is not said to have run while it waited
        "epd_encode_batch_size_sum": 4.0,
        "epd_worker_restarts_total": 3.0,
        "epd_embedding_cache_hits_total": 7.0,
        "epd_embedding_cache_misses_total": 8.0,
        "epd_embedding_cache_bytes": 64.0,
        "epd_arena_leases": 5.0,
        "epd_arena_leases_expired_total": 6.0,
        "epd_transfer_failures_total": 2.0,
        "epd_digest_failures_total": 1.0,
        "nixl_transfer_bytes_total": 4096.0,
        "nixl_transfer_seconds_sum": 0.5,
        "nixl_transfer_seconds_count": 2.0,
    }.items():
        lines = [line for line in text.splitlines() if line.startswith(name + "{")]
        assert len(lines) == 1, f"{name}: {lines}"
        found, said = lines[0].rsplit(" ", 1)
        assert ",".join(sorted(found[len(name) + 1 : -1].split(","))) == labels
        assert float(said) == value, name
    assert (
        'epd_requests_total{dynamo_component="Stage",dynamo_namespace="space",model="model",status="200"} 1.0' in text
    )

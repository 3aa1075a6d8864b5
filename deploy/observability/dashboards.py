# SPDX-License-Identifier: Apache-2.0
"""Writes ``grafana/dashboards/*.json``: ``python deploy/observability/dashboards.py``.

A panel is a title, a unit, what to do with the number, and its queries with their legends. The form is Grafana's
classic dashboard JSON model, which every version since 8 reads and migrates.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent / "grafana" / "dashboards"
SCHEMA = 39
"""Grafana 11's."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS, WIDTH, HEIGHT = 24, 8, 8
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
G = 'graph=~"$graph"'
S = f'{G}, dynamo_component=~"$stage"'
BY_STAGE, BY_WORKER = "{{dynamo_component}}", "{{worker}}"


@dataclass(frozen=True)
class Panel:
    """``unit``: one of Grafana's. ``queries``: PromQL and legend."""

    title: str
    unit: str
    description: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"


def lines(title: str, unit: str, description: str, *queries: tuple[str, str]) -> Panel:
    return Panel(title, unit, description, queries)


def number(title: str, unit: str, description: str, expression: str) -> Panel:
    return Panel(title, unit, description, ((expression, ""),), "stat")


def buckets(title: str, unit: str, description: str, name: str, labels: str) -> Panel:
    return Panel(
        title,
        unit,
        description,
        ((f"sum by (le) (increase({name}_bucket{{{labels}}}[$__rate_interval]))", "{{le}}"),),
        "heatmap",
    )


def rate(name: str, labels: str, by: str) -> str:
    return f"sum by ({by}) (rate({name}{{{labels}}}[$__rate_interval]))"


def by_stage(name: str, labels: str) -> tuple[str, str]:
    """The rate of a counter, with a line a stage."""
    return rate(name, labels, "dynamo_component"), BY_STAGE


def by_worker(name: str, labels: str) -> tuple[str, str]:
    return rate(name, labels, "worker"), BY_WORKER


def mean(name: str, labels: str, by: str) -> str:
    return f"{rate(f'{name}_sum', labels, by)} / {rate(f'{name}_count', labels, by)}"


def quantile(q: float, name: str, labels: str, by: str = "") -> str:
    return f"histogram_quantile({q}, {rate(f'{name}_bucket', labels, f'{by}, le' if by else 'le')})"


def quantiles(name: str, labels: str) -> tuple[tuple[str, str], ...]:
    return tuple((quantile(q, name, labels), legend) for legend, q in QUANTILES.items())


OVERVIEW = (
    number(
        "Workers that answer",
        "short",
        "Fewer than were configured: DynamoWorkerDown says which. The panel of workers by stage says where.",
        f"sum(stage:up:sum{{{G}}})",
    ),
    number(
        "Requests per second",
        "reqps",
        "What the frontends answer, whatever the status. Compare with the load test of this configuration.",
        f"sum(graph:epd_requests:rate5m{{{G}}})",
    ),
    number(
        "Share of requests that fail",
        "percentunit",
        "Statuses of 500 and above. Above 5 % DynamoRequestsFail fires: look at the frontends' log by request id.",
        f"max(graph:epd_requests_failed:ratio_rate5m{{{G}}})",
    ),
    lines(
        "Alerts that fire",
        "short",
        "Each has a heading in deploy/observability/README.md that says what to do.",
        ('count by (alertname) (ALERTS{alertname=~"Dynamo.+", alertstate="firing"}) or vector(0)', "{{alertname}}"),
    ),
    lines(
        "Answers by status",
        "reqps",
        "429 and 503: too much is asked, or a limit is too low. 499: clients leave, see the time to first token. 500: "
        "look at the log.",
        (f"sum by (status) (graph:epd_requests:rate5m{{{G}}})", "{{status}}"),
    ),
    lines(
        "Request duration",
        "s",
        "From arrival to the last byte, of all routes together. When it rises look at waits by stage first.",
        *quantiles("epd_request_duration_seconds", G),
    ),
    lines(
        "Time to first token",
        "s",
        "What a reader waits before anything comes: encode, prefill and all waits. Grow the stage that waits.",
        *quantiles("epd_time_to_first_token_seconds", G),
    ),
    lines(
        "Inter-token latency",
        "s",
        "Between two deltas. It rises when decode batches grow: grow the DecodeWorker.",
        *quantiles("epd_inter_token_latency_seconds", G),
    ),
    lines(
        "Wait by stage, 95th percentile",
        "s",
        "The stage that is short is the one whose requests wait: give it workers (dynamo scale), or let the planner.",
        (f"stage:epd_stage_queue_seconds:p95_5m{{{G}}}", BY_STAGE),
    ),
    lines(
        "Run by stage, 95th percentile",
        "s",
        "Time in a stage without its waits. When it rises under the same load look at CPU, GPU and batch sizes.",
        (f"stage:epd_stage_run_seconds:p95_5m{{{G}}}", BY_STAGE),
    ),
    lines(
        "Requests in each stage",
        "short",
        "Waiting and running. One that only grows is a stage that is short, or whose requests hang.",
        (f"stage:epd_stage_queue_depth:sum{{{G}}}", BY_STAGE),
    ),
    lines(
        "Workers by stage",
        "short",
        "That answer. A dip is a death (DynamoWorkerDied); a step is the planner, or dynamo scale.",
        (f"stage:up:sum{{{G}}}", BY_STAGE),
    ),
)

STAGE = (
    lines(
        "Wait",
        "s",
        "Above the planner's queue target (0.5 s unless configured): the stage is short of workers.",
        *quantiles("epd_stage_queue_seconds", S),
    ),
    lines(
        "Run",
        "s",
        "Time in the stage without waits. Compare workers in the panels below when the 99th percentile alone rises.",
        *quantiles("epd_stage_run_seconds", S),
    ),
    buckets(
        "Waits",
        "s",
        "Two bands are two kinds of request, or one slow worker among fast ones.",
        "epd_stage_queue_seconds",
        S,
    ),
    lines(
        "Requests per second",
        "reqps",
        "That ended in the stage. Flat while requests in the stage grow: this is all it can do.",
        by_stage("epd_stage_run_seconds_count", S),
    ),
    lines(
        "Requests that run at once",
        "short",
        "The mean. At workers times concurrency (Planner.stages) the stage is full: grow it.",
        by_stage("epd_stage_run_seconds_sum", S),
    ),
    lines(
        "Requests in each worker",
        "short",
        "Waiting and running. Uneven for long: look at routing, affinity binds repeats to one worker.",
        (f"epd_stage_queue_depth{{{S}}}", BY_WORKER),
    ),
    lines(
        "CPU of each worker",
        "short",
        "Cores. An engine's own process is not counted here. A worker at 1 is bound by its Python thread: grow.",
        by_worker("process_cpu_seconds_total", S),
    ),
    lines(
        "Memory of each worker",
        "bytes",
        "Resident, arenas included. One that never stops growing leaks: keep a soak's plot and report it.",
        (f"process_resident_memory_bytes{{{S}}}", BY_WORKER),
    ),
    lines(
        "Arena in use",
        "bytes",
        "Full: callers wait and are then answered overloaded. Give arena-bytes, or find who holds leases.",
        (f"epd_arena_used_bytes{{{S}}}", BY_WORKER),
    ),
    lines(
        "Leases",
        "short",
        "Hand-offs that are not yet READ. At rest it must be 0; if not, readers die or forget: see hand-offs.",
        (f"epd_arena_leases{{{S}}}", BY_WORKER),
    ),
    lines(
        "Open files",
        "short",
        "Sockets too. Near the limit (ulimit -n) connections fail; a steady rise is a leak.",
        (f"process_open_fds{{{S}}}", BY_WORKER),
    ),
    lines(
        "Restarts of each worker",
        "short",
        "After deaths, since the graph was served. A step is a death (DynamoWorkerDied): read the worker's last lines.",
        (f"epd_worker_restarts_total{{{S}}}", BY_WORKER),
    ),
)

ENGINES = (
    lines(
        "Images in one forward",
        "short",
        "The mean; it grows with the load by itself. At max-batch while requests wait: grow the EncodeWorker.",
        (mean("epd_encode_batch_size", G, "dynamo_component"), BY_STAGE),
    ),
    lines(
        "Images found encoded",
        "percentunit",
        "Share of images whose embedding was in the cache. Low although pictures repeat: the arena is too small.",
        (f"graph:epd_embedding_cache:hit_ratio_rate5m{{{G}}}", "{{graph}}"),
    ),
    lines(
        "Embedding cache",
        "bytes",
        "Flat at the arena's size is normal: it evicts what is not leased.",
        (f"epd_embedding_cache_bytes{{{G}}}", BY_WORKER),
    ),
    lines(
        "Prompt tokens per second",
        "short",
        "By where they came from: computed here, found in the prefix cache, or READ as KV blocks. Decode computes few.",
        (rate("vllm:prompt_tokens_by_source_total", G, "dynamo_component, source"), f"{BY_STAGE} {{{{source}}}}"),
    ),
    lines(
        "Generated tokens per second",
        "short",
        "Decode's are answers; prefill samples one per prompt, which is thrown away.",
        by_stage("vllm:generation_tokens_total", G),
    ),
    lines(
        "Requests that run in the engine",
        "short",
        "The size of the batch. At max-num-seqs the engine is full: grow.",
        (f"vllm:num_requests_running{{{G}}}", BY_WORKER),
    ),
    lines(
        "Requests that wait in the engine",
        "short",
        "For room in the batch or in the KV cache. Above 0 for long: grow the stage.",
        (f"vllm:num_requests_waiting{{{G}}}", BY_WORKER),
    ),
    lines(
        "KV cache in use",
        "percentunit",
        "Above 95 % DynamoKvCacheFull fires: grow, give gpu-memory-utilization, or shorten max-model-len.",
        (f"vllm:kv_cache_usage_perc{{{G}}}", BY_WORKER),
    ),
    lines(
        "Prompt tokens found in the prefix cache",
        "percentunit",
        "Of those looked for. It falls when conversations no longer reach the worker that knows them.",
        (
            f"{rate('vllm:prefix_cache_hits_total', G, 'dynamo_component')} "
            f"/ {rate('vllm:prefix_cache_queries_total', G, 'dynamo_component')}",
            BY_STAGE,
        ),
    ),
    lines(
        "Preemptions per second",
        "short",
        "Each costs a whole request again. Above 0: the KV cache is too small for the batch.",
        by_stage("vllm:num_preemptions_total", G),
    ),
    lines(
        "Engine's time to first token, 95th percentile",
        "s",
        "Of the engine alone. Prefill's is computing; decode's is waiting for KV blocks.",
        (quantile(0.95, "vllm:time_to_first_token_seconds", G, "dynamo_component"), BY_STAGE),
    ),
    lines(
        "Engine's inter-token latency, 95th percentile",
        "s",
        "Lower than the one of the overview: the difference is what stands between engine and client.",
        (quantile(0.95, "vllm:inter_token_latency_seconds", G, "dynamo_component"), BY_STAGE),
    ),
)

HAND_OFFS = (
    lines(
        "Bytes READ over NIXL per second",
        "Bps",
        "By the stage that READs. 0 under load: a hand-off goes another way, or its stage is idle.",
        (f"stage:nixl_transfer_bytes:rate5m{{{G}}}", BY_STAGE),
    ),
    lines(
        "Seconds of one READ",
        "s",
        "The mean, with its digest. When it rises at the same size: the network, or a machine without CPU to spare.",
        (f"stage:nixl_transfer_seconds:mean5m{{{G}}}", BY_STAGE),
    ),
    lines(
        "READs per second",
        "ops",
        "By the stage that READs. More than its requests bring: hand-offs are repeated, see failures.",
        by_stage("nixl_transfer_seconds_count", G),
    ),
    lines(
        "KV cache taken per second",
        "Bps",
        "What decode takes from prefill. 0 under load: all is prefilled where it decodes.",
        by_stage("vllm:nixl_bytes_transferred_sum", G),
    ),
    lines(
        "Seconds of one KV transfer, 95th percentile",
        "s",
        "It is part of the time to first token. When it rises alone: look at the network between prefill and decode.",
        (quantile(0.95, "vllm:nixl_xfer_time_seconds", G, "dynamo_component"), BY_STAGE),
    ),
    lines(
        "Failures per second",
        "ops",
        "READs, KV transfers, and bytes whose digest was wrong (DynamoDigestRefused: never shrug that off).",
        (rate("epd_transfer_failures_total", G, "dynamo_component"), f"READ {BY_STAGE}"),
        (rate("vllm:nixl_num_failed_transfers_total", G, "dynamo_component"), f"KV {BY_STAGE}"),
        (rate("epd_digest_failures_total", G, "dynamo_component"), f"digest {BY_STAGE}"),
    ),
    lines(
        "Leases",
        "short",
        "By the stage that owns the bytes. It follows the load; what stays at rest is held by a reader that died.",
        (f"sum by (dynamo_component) (epd_arena_leases{{{G}}})", BY_STAGE),
    ),
    lines(
        "Leases that ended by time, per second",
        "ops",
        "Nobody gave them back. After a death that is right; without one a reader is too slow for its lease.",
        by_stage("epd_arena_leases_expired_total", G),
    ),
    lines(
        "Arenas in use",
        "bytes",
        "By stage. Full arenas make callers wait: give arena-bytes to that stage, or workers to the one that READs.",
        (f"sum by (dynamo_component) (epd_arena_used_bytes{{{G}}})", BY_STAGE),
    ),
    lines(
        "Calls over NATS per second",
        "reqps",
        "By component and endpoint, as Dynamo counts them. Repeats show as more calls than requests.",
        (
            rate("dynamo_component_requests_total", G, "dynamo_component, dynamo_endpoint"),
            "{{dynamo_component}}.{{dynamo_endpoint}}",
        ),
    ),
    lines(
        "Bytes of calls over NATS per second",
        "Bps",
        "Control only: tensors and pictures never go here. Megabytes per call are prompts of that size.",
        by_stage("dynamo_component_request_bytes_total", G),
    ),
)

IMAGE, EMBED = f'{G}, dynamo_component="ImageWorker"', f'{G}, dynamo_component="EmbedWorker"'
IMAGES = (
    lines(
        "Pictures made per second",
        "ops",
        "By worker. Uneven for long: one of them is slower, or dead.",
        by_worker("epd_images_generated_total", G),
    ),
    lines(
        "Seconds of one denoise step",
        "s",
        "The cost of a picture is this times its steps. When it rises with the batch, that is the price of batching.",
        *quantiles("epd_denoise_step_seconds", G),
    ),
    lines(
        "Wait for the image worker",
        "s",
        "A picture takes long, so waits grow fast: grow the ImageWorker early.",
        *quantiles("epd_stage_queue_seconds", IMAGE),
    ),
    lines(
        "Wait of jobs",
        "s",
        "In the queue, until a worker took them. It counts for the planner and KEDA: where it stays, max is too low.",
        *quantiles("epd_job_queue_seconds", IMAGE),
    ),
    lines(
        "Jobs that wait",
        "short",
        "That no image worker has taken. Jobs may wait, but one that only grows is an ImageWorker that is short.",
        (f"graph:epd_job_queue_depth:max{{{G}}}", "{{graph}}"),
    ),
    lines(
        "Run in the image worker",
        "s",
        "From its turn to the pixels. Compare with steps times seconds of one step: the rest is the VAE and hand-offs.",
        *quantiles("epd_stage_run_seconds", IMAGE),
    ),
    lines(
        "Pictures stored and expired per second",
        "ops",
        "Stored ones stay for the store's ttl. Stored without end and none expired: look at the store's space.",
        (rate("epd_images_stored_total", G, "graph"), "stored"),
        (rate("epd_images_expired_total", G, "graph"), "expired"),
    ),
    lines(
        "Token states READ by the image worker",
        "Bps",
        "From the EmbedWorker's T5. 0 while pictures are made: the image worker holds a T5 of its own.",
        (f"stage:nixl_transfer_bytes:rate5m{{{IMAGE}}}", BY_STAGE),
    ),
    lines(
        "Texts in one batch",
        "short",
        "The mean; it grows with the load by itself. Flat while texts wait: grow the EmbedWorker.",
        (mean("epd_embed_batch_size", G, "dynamo_component"), BY_STAGE),
    ),
    lines(
        "Texts per second",
        "ops",
        "By worker, prompts to condition pictures and texts to compare alike.",
        by_worker("epd_embed_batch_size_sum", G),
    ),
    lines(
        "Wait for T5",
        "s",
        "Part of every picture's time. Above some hundredths of a second: grow the EmbedWorker.",
        *quantiles("epd_stage_queue_seconds", EMBED),
    ),
    lines(
        "Run in T5",
        "s",
        "It grows with the length of texts and the batch.",
        *quantiles("epd_stage_run_seconds", EMBED),
    ),
)

PLANNER = (
    lines(
        "Workers, and workers wanted",
        "short",
        "Apart for longer than a start takes: DynamoPlannerShort; the planner's log says what was refused.",
        (f"epd_planner_replicas{{{G}}}", "{{stage}}"),
        (f"epd_planner_target_replicas{{{G}}}", "{{stage}} wanted"),
    ),
    lines(
        "Wait as the planner sees it",
        "s",
        "Above the stage's queue-target for long although it may grow: its concurrency is guessed too high.",
        (f"epd_planner_queue_seconds{{{G}}}", "{{stage}}"),
    ),
    lines(
        "Changes in an hour",
        "short",
        "Up and down by turns within minutes is flapping: raise the stage's cool-down or tolerance.",
        (f"sum by (stage, direction) (increase(epd_planner_decisions_total{{{G}}}[1h]))", "{{stage}} {{direction}}"),
    ),
    lines(
        "Wait as requests had it, 95th percentile",
        "s",
        "The planner holds the mean to its target; the tail may be some times that.",
        (f"stage:epd_stage_queue_seconds:p95_5m{{{G}}}", BY_STAGE),
    ),
    lines(
        "Requests that run at once",
        "short",
        "The load that the planner divides by concurrency: rate times run time, by Little's law.",
        (f"stage:epd_stage_run_seconds_sum:rate5m{{{G}}}", BY_STAGE),
    ),
    lines(
        "Workers that answer",
        "short",
        "What came of it. Fewer than the planner counts: see DynamoWorkerDown.",
        (f"stage:up:sum{{{G}}}", BY_STAGE),
    ),
)

DASHBOARDS: dict[str, tuple[str, tuple[Panel, ...]]] = {
    "overview": ("Overview", OVERVIEW),
    "stage": ("One stage", STAGE),
    "engines": ("Encode, prefill, decode", ENGINES),
    "hand-offs": ("Hand-offs", HAND_OFFS),
    "images": ("T5 and images", IMAGES),
    "planner": ("Planner", PLANNER),
}


def variable(name: str, query: str, *, several: bool) -> dict[str, Any]:
    """A variable that lists a label's values."""
    found: dict[str, Any] = {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
    }
    return found | ({"multi": True, "includeAll": True, "allValue": ".+"} if several else {})


def rendered(panel: Panel, place: int) -> dict[str, Any]:
    column, row = place % (COLUMNS // WIDTH), place // (COLUMNS // WIDTH)
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    options: dict[str, Any] = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    if panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "graphMode": "area"}
    elif panel.kind == "heatmap":
        defaults = {}
        options = {"calculate": False, "yAxis": {"unit": panel.unit}, "cellValues": {"unit": "short"}}
    else:
        defaults["custom"] = {"fillOpacity": 10, "showPoints": "never"}
    return {
        "id": place + 1,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": expression,
                "legendFormat": legend,
                **({"format": "heatmap"} if panel.kind == "heatmap" else {}),
            }
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }


def dashboard(name: str) -> dict[str, Any]:
    title, panels = DASHBOARDS[name]
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "data source"},
        variable("graph", 'label_values(up{dynamo_component!=""}, graph)', several=True),
    ]
    if name == "stage":
        stages = 'label_values(stage:epd_stage_queue_depth:sum{graph=~"$graph"}, dynamo_component)'
        variables.append(variable("stage", stages, several=False))
    return {
        "uid": f"dynamo-{name}",
        "title": f"Dynamo / {title}",
        "tags": ["dynamo"],
        "schemaVersion": SCHEMA,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["dynamo"], "title": "Dynamo", "asDropdown": True, "keepTime": True}],
        "templating": {"list": variables},
        "panels": [rendered(panel, place) for place, panel in enumerate(panels)],
    }


def text(name: str) -> str:
    return json.dumps(dashboard(name), indent=2) + "\n"


if __name__ == "__main__":
    for one in DASHBOARDS:
        (DIRECTORY / f"{one}.json").write_text(text(one))

"""The configuration file: what it may hold, and the sentences that tell what is wrong with it."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster.config import ConfigError, DeploymentConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MINIMAL = "model: {path: /models/tiny}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "deployment.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    path = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    config = load_config(path)
    assert config.model.path.is_absolute()
    on_cpu = path.stem.startswith("tiny_")
    assert config.data_backend == ("gloo" if on_cpu else "nccl")
    assert config.transport_kind == ("p2p" if on_cpu else "all_to_all")


def test_the_named_configs_exist() -> None:
    assert {"tiny_cpu", "tiny_failover", "scout_8xh100", "maverick_4x8h100"} <= {path.stem for path in CONFIGS}


def test_only_the_model_is_required(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL + "experts:\n"))
    assert config.model.served_name == "tiny"
    assert config.attention.device == "cpu"
    assert config.attention.compute_threads == 1
    assert config.experts.per_actor is None
    assert config.experts.replicas == 1
    assert config.balance.mode == "off"


@pytest.mark.parametrize(
    ("sections", "kind"),
    [
        ("", "p2p"),
        ("transport: {kind: p2p}", "p2p"),
        ("transport: {kind: all_to_all}", "all_to_all"),
        ("attention: {num_gpus: 1}\nexperts: {num_gpus: 1}", "all_to_all"),
        ("attention: {num_gpus: 1}\nexperts: {num_gpus: 1}\ntransport: {kind: p2p}", "p2p"),
    ],
)
def test_the_device_decides_the_transport_unless_it_is_named(tmp_path: Path, sections: str, kind: str) -> None:
    assert load_config(write(tmp_path, MINIMAL + sections)).transport_kind == kind


def test_off_needs_no_quotes(tmp_path: Path) -> None:
    # YAML 1.1 reads a bare off as false.
    assert load_config(write(tmp_path, MINIMAL + "balance: {mode: off}")).balance.mode == "off"
    assert load_config(write(tmp_path, MINIMAL), ["balance.mode=auto", "balance.mode=off"]).balance.mode == "off"


def test_two_micro_batches_need_sockets(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, MINIMAL), ["transport.micro_batches=2"]).transport.micro_batches == 2
    text = "transport: {kind: all_to_all, micro_batches: 2}\n"
    assert problems(tmp_path, MINIMAL + text) == [
        "transport.micro_batches 2 needs transport.kind p2p: with all_to_all every member enters each layer's "
        "collectives once a step"
    ]


def test_config_is_frozen_and_travels(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    with pytest.raises(ValidationError):
        config.log_level = "DEBUG"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config


def test_overrides_are_yaml_and_the_last_one_wins(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, MINIMAL + "engine: {page_size: 16}\n"),
        [
            "engine.page_size=32",
            "engine.page_size=64",
            "experts.resources={fast: 0.5}",
            "model.name=llama",
            "experts.per_actor=null",
        ],
    )
    assert config.engine.page_size == 64
    assert config.experts.resources == {"fast": 0.5}
    assert config.model.served_name == "llama"
    assert config.experts.per_actor is None


def test_model_path_is_beside_the_file_or_under_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "beside").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "here", "model: {path: beside}\n")
    assert load_config(path).model.path == tmp_path / "here" / "beside"
    assert load_config(path, ["model.path=elsewhere"]).model.path == tmp_path / "elsewhere"
    assert load_config(path, ["model.path=nowhere"]).model.path == tmp_path / "here" / "nowhere"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "engine: {max_batch_token: 1}",
            "engine.max_batch_token is not a known key; the nearest is engine.max_batch_tokens",
        ),
        ("expert: {actors: 2}", "expert is not a known key; the nearest is experts"),
        ("gateway: {port: 1}", "gateway.port is not a known key; the nearest is gateway.http_port"),
        ("attention: {kv_tokens: 64}", "attention.kv_tokens is not a known key; the nearest is engine.kv_tokens"),
        ("engine: {page_size: 0}", "engine.page_size must be at least 1, not 0"),
        ("engine: {page_size: 1.5}", "engine.page_size must be a whole number, not 1.5"),
        ("engine: {page_size: many}", "engine.page_size must be a whole number, not 'many'"),
        ("engine: [1]", "engine must be a mapping, not [1]"),
        ("transport: {timeout_s: soon}", "transport.timeout_s must be a number, not 'soon'"),
        ("transport: {timeout_s: 0}", "transport.timeout_s must be above 0, not 0"),
        ("transport: {kind: socket}", "transport.kind must be 'auto', 'p2p' or 'all_to_all', not 'socket'"),
        ("transport: {deadline_s: 0}", "transport.deadline_s must be above 0, not 0"),
        ("experts: {replicas: 0}", "experts.replicas must be at least 1, not 0"),
        (
            "experts: {actors: 2, replicas: 3}",
            "experts.replicas (3) must be at most experts.actors (2): the holders of an expert are different actors",
        ),
        ("balance: {mode: on}", "balance.mode must be 'off', 'manual' or 'auto', not True"),
        ("balance: {threshold: 1}", "balance.threshold must be above 1, not 1"),
        ("balance: {window_s: -1}", "balance.window_s must be above 0, not -1"),
        ("balancing: {mode: auto}", "balancing is not a known key; the nearest is balance"),
        ("gateway: {http_port: 70000}", "gateway.http_port must be at most 65535, not 70000"),
        ("gateway: {host: ''}", "gateway.host must not be empty"),
        ("gateway: {host: 7}", "gateway.host must be text, not 7"),
        ("gateway: {grpc_port: 8000}", "gateway.grpc_port must differ from gateway.http_port (8000)"),
        (
            "gateway: {grpc: {tls: {cert: a, key: b}}}",
            "gateway.grpc.tls needs gateway.grpc.mode to be standalone: Ray Serve's proxy has no TLS",
        ),
        (
            "gateway: {grpc: {tls: {crt: a, cert: a, key: b}}}",
            "gateway.grpc.tls.crt is not a known key; the nearest is gateway.grpc.tls.cert",
        ),
        ("gateway: {grpc: {mode: own}}", "gateway.grpc.mode must be 'serve' or 'standalone', not 'own'"),
        ("gateway: {max_body_bytes: 0}", "gateway.max_body_bytes must be at least 1, not 0"),
        ("gateway: {drain_timeout_s: -1}", "gateway.drain_timeout_s must be at least 0, not -1"),
        ("gateway: {api_keys: ['  ']}", "gateway.api_keys must not hold an empty key"),
        ("engine: {kv_tokens: 100}", "engine.kv_tokens (100) must be a multiple of engine.page_size (16)"),
        ("experts: {num_cpus: 0}", "experts.num_cpus must be above 0 when experts reserves no GPU and no resources"),
        ("experts: {resources: {GPU: 1}}", "experts.resources must not hold GPU: use experts.num_gpus"),
        ("experts: {resources: {fast: 0}}", "experts.resources.fast must be above 0, not 0"),
        ("vision: {num_cpus: 0}", "vision.num_cpus must be above 0 when vision reserves no GPU and no resources"),
        ("vision: {num_gpus: 2}", "vision.num_gpus must be at most 1, not 2"),
        ("vision: {min_replicas: -1}", "vision.min_replicas must be at least 0, not -1"),
        (
            "vision: {min_replicas: 3, max_replicas: 2}",
            "vision.max_replicas (2) must be at least vision.min_replicas (3)",
        ),
        ("vision: {replicas: 2}", "vision.replicas is not a known key; the nearest is vision.min_replicas"),
        (
            "vision: {url_hosts: [example.org]}",
            "vision.url_hosts needs vision.allow_urls to be true: without it, no URL is fetched",
        ),
        (
            "vision: {allow_urls: true, url_hosts: [a.org, '*.a.org', '[::1]:80', 'http://a.org']}",
            "vision.url_hosts must hold hosts, such as example.org, *.example.org or store.example.org:9000, "
            "not 'http://a.org'",
        ),
        (
            "attention: {num_gpus: 1}",
            "attention.num_gpus and experts.num_gpus must be equal: tokens travel between devices of one kind",
        ),
        (
            "engine: {max_running: 64, max_batch_tokens: 32}",
            "engine.max_running (64) must be at most engine.max_batch_tokens (32): "
            "every running request takes a row of each step",
        ),
    ],
)
def test_one_sentence_names_the_field(tmp_path: Path, text: str, problem: str) -> None:
    assert problems(tmp_path, MINIMAL + text) == [problem]


def test_a_context_longer_than_the_cache_is_refused(tmp_path: Path) -> None:
    found = problems(tmp_path, MINIMAL, "model.max_context=4096", "engine.kv_tokens=1024")
    assert found == [
        "model.max_context (4096) must be at most engine.kv_tokens (1024): a longer request could never run"
    ]


@pytest.mark.parametrize("endpoint", ["collector:4318", "grpc://collector:4317", "http://"])
def test_traces_go_to_a_url(tmp_path: Path, endpoint: str) -> None:
    assert problems(tmp_path, MINIMAL, f"tracing.endpoint='{endpoint}'") == [
        f"tracing.endpoint must be a URL such as http://collector:4318, not '{endpoint}'"
    ]
    assert problems(tmp_path, MINIMAL, "tracing.sample=1.5") == ["tracing.sample must be at most 1, not 1.5"]


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, "engine: {page_size: 0}\nlog_level: LOUD\n")
    assert len(found) == 3
    assert found[0] == "model is required"


def test_paths_of_the_gateway_are_beside_the_file(tmp_path: Path) -> None:
    text = (
        "gateway: {api_keys: [secret], api_keys_file: keys, grpc: {mode: standalone, tls: {cert: c.pem, key: /k.pem}}}"
    )
    gateway = load_config(write(tmp_path, MINIMAL + text)).gateway
    tls = gateway.grpc.tls
    assert tls is not None and (tls.cert, tls.key, tls.client_ca) == (tmp_path / "c.pem", Path("/k.pem"), None)
    assert gateway.api_keys_file == tmp_path / "keys"
    assert "secret" not in repr(gateway) and gateway.api_keys[0].get_secret_value() == "secret"


@pytest.mark.parametrize("override", ["engine.page_size", "=3", "engine..page_size=3"])
def test_an_override_without_form_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--set {override}: must have the form key=value")):
        load_config(write(tmp_path, MINIMAL), [override])


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="log_level is a value, not a section"):
        load_config(write(tmp_path, MINIMAL + "log_level: INFO\n"), ["log_level.deep=1"])


def test_an_unknown_override_names_the_nearest_key(tmp_path: Path) -> None:
    assert problems(tmp_path, MINIMAL, "experts.actor=3") == [
        "experts.actor is not a known key; the nearest is experts.actors"
    ]


@pytest.mark.parametrize(
    ("text", "fault"), [("a: [", "is not YAML"), ("- a", "must hold a mapping"), ("", "must hold")]
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        load_config(write(tmp_path, text))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot be read \(No such file"):
        load_config(tmp_path / "absent.yaml")


def test_built_in_code_the_same_rules_hold() -> None:
    with pytest.raises(ValueError, match="must differ"):
        DeploymentConfig.model_validate({"model": {"path": "x"}, "gateway": {"grpc_port": 8000}})

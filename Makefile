# make setup | serve | test | test-fast | check | protos | k8s | clean
PYTHON ?= python3
# More arguments for pip, such as `--index-url …` of an index with CPU-only builds of torch.
PIP_FLAGS ?=
CONFIG ?= configs/tiny_cpu.yaml

BIN := .venv/bin
STAMP := .venv/.installed
PROTOS := $(wildcard protos/herder/v1/*.proto)
protoc = $(BIN)/python -m grpc_tools.protoc -I protos --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	--plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTOS)

.PHONY: setup serve test test-fast check protos protos-drift k8s clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@# Compiles the kernels for this processor, and keeps them: or else all actors would, side by side, at their first start.
	$(BIN)/python -c 'import llama4.decoder'
	touch $@

serve: setup
	$(BIN)/herder serve $(CONFIG)

# Two at a time: one runs the deployments of tests/e2e, one after the other, and the other all the rest.
pytest = $(BIN)/python -m pytest -n 2

test: setup
	$(pytest)

test-fast: setup
	$(pytest) -m "not cluster"

check: setup protos-drift
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/buf lint protos

protos: setup
	$(call protoc,protos)

# The generated code in the repository is what the .proto files give.
protos-drift: setup
	@new=$$(mktemp -d) && trap 'rm -rf "$$new"' EXIT && $(call protoc,"$$new") && \
	for file in $$(cd "$$new" && find . -name '*.py' -o -name '*.pyi'); do \
		cmp -s "$$new/$$file" "protos/$$file" || { echo "protos/$$file differs from its .proto file: run make protos"; exit 1; }; \
	done && echo "generated protos match their .proto files"

# The manifests in the repository, made again from their configurations by the command that each overlay says.
k8s: setup
	@sed -ns '1s/^# Made by: herder/$(subst /,\/,$(BIN))\/herder/p' k8s/overlays/*/kustomization.yaml | sh -e

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

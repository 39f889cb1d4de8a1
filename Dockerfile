# syntax=docker/dockerfile:1.7
# Herder on a node of a Ray cluster. Targets: `cpu`, and `cuda` (torch brings CUDA, cuDNN and NCCL with it).
#
#   docker build --target cuda -t herder:0.1.0-cuda .
#
# Every Ray node runs the same image: Serve's proxies import the gRPC services, and actors the rest.
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt

FROM builder AS cpu-builder
# The URL of an index with CPU-only builds of torch (--build-arg); without one, torch brings CUDA along unused.
ARG PIP_EXTRA_INDEX_URL
RUN pip install -c constraints.txt -r requirements.txt
COPY . .
RUN pip install --no-deps .

FROM builder AS cuda-builder
RUN pip install -c constraints.txt -r requirements.txt
COPY . .
RUN pip install --no-deps .

FROM python:${PYTHON} AS runtime
# KubeRay's probes ask by wget, Ray shows processes by procps.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends procps wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 herder \
    && useradd --uid 1000 --gid 1000 --create-home herder
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
COPY configs /opt/herder/configs
COPY checkpoints/tiny /opt/herder/checkpoints/tiny
WORKDIR /home/herder
USER 1000:1000

FROM runtime AS cpu
COPY --from=cpu-builder /opt/venv /opt/venv
CMD ["herder", "--help"]

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda-builder /opt/venv /opt/venv
CMD ["herder", "--help"]

# lit_qlora with everything that its commands need. For a GPU, and for a CPU:
#   docker build -t lit-qlora . && docker run --rm --gpus all -v "$PWD:/work" lit-qlora demo
#   docker build -t lit-qlora:cpu --build-arg VARIANT=cpu . && docker run --rm -v "$PWD:/work" lit-qlora:cpu demo
# It runs as user 1000; whose folder belongs to another adds --user "$(id -u):$(id -g)".
# The wheels of torch bring the CUDA runtime, so the host needs NVIDIA's driver and container toolkit alone.
ARG VARIANT=cuda

FROM python:3.12-slim AS base
# Triton compiles its launchers with a C compiler when a kernel is first used.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM base AS cpu
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

FROM ${VARIANT} AS final
WORKDIR /source
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY lit_qlora lit_qlora
COPY finetune finetune
COPY scripts scripts
COPY eval eval
COPY checkpoints/lit-qlora checkpoints/lit-qlora
RUN pip install --no-cache-dir -c constraints.txt ".[serve,gguf,tensorboard]" \
    && rm -rf /source/*
# Models, data and runs lie in the folder that is mounted here.
RUN useradd --create-home --uid 1000 user && mkdir /work && chown user /work
USER 1000
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["lit-qlora"]

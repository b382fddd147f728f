# The bundle with everything it runs on; docs/container.md says how to build and use it.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# The bundle's files, readable by any user whatever the checkout's permissions are.
FROM ${BASE_IMAGE} AS bundle
ARG REVISION=unknown
WORKDIR /opt/neuroverse3d
COPY . .
RUN printf '%s\n' "$REVISION" > REVISION \
    && python3 -m compileall -q --invalidation-mode unchecked-hash neuroverse3d scripts \
    && chmod -R a+rX,go-w .

FROM ${BASE_IMAGE}

# cuda: PyTorch from PyPI with the CUDA libraries; cpu: its CPU build, from an index or a folder that pip knows.
ARG TORCH=cuda
COPY requirements-torch-${TORCH}.lock /opt/locks/
RUN python3 -m venv --without-pip /opt/venv \
    && python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --require-hashes \
        --only-binary=:all: -r /opt/locks/requirements-torch-${TORCH}.lock
COPY requirements.lock /opt/locks/
RUN python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --require-hashes \
        --only-binary=:all: -r /opt/locks/requirements.lock \
    && python3 -m pip --python /opt/venv/bin/python check

# HOME and USER are for whoever `--user` names; NVIDIA's are read by its container toolkit.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/neuroverse3d \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    USER=neuroverse3d \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

COPY --from=bundle /opt/neuroverse3d /opt/neuroverse3d
WORKDIR /opt/neuroverse3d
# Mount points exist, so that a read-only file system does not matter; they belong to root, so that nothing is written
# into a container by mistake.
RUN python -m scripts.bill_of_materials --output_dir sbom && mkdir -p /data /context /out

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Neuroverse3D" \
    org.opencontainers.image.description="3D in-context learning for neuroimaging. Research use only, not a medical device." \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"

USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "scripts.container"]
CMD ["--help"]

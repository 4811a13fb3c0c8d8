# dn_detr_d2 in a container, for CPUs by default. Not built by the tests of this project (they have no Docker): if a step
# fails for you, the same steps by hand are in docs/install.md.
#
#   docker build -t dn_detr_d2 .
#   docker build -t dn_detr_d2:cuda --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg CUDA=1 .
#   docker run --rm dn_detr_d2 doctor
#   docker run --rm -v "$PWD:/data" dn_detr_d2 predict --config-file /data/config.yaml --input /data/photos \
#       --output /data/drawn MODEL.WEIGHTS /data/model_final.pth
#
# BASE   image to start from, with Python 3.10 to 3.13; with CUDA=1 one with nvcc of the CUDA version that torch has
# CUDA   1 = PyTorch with CUDA, and the CUDA kernels compiled; TORCH_CUDA_ARCH_LIST names the GPUs, default all
ARG BASE=ubuntu:24.04
FROM ${BASE}
ARG CUDA=0
ARG TORCH_CUDA_ARCH_LIST=""
ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PATH=/opt/venv/bin:$PATH
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
WORKDIR /opt/dn_detr_d2
# the requirements first: a change of the code does not install them again
COPY requirements.txt ./
COPY tools/install_detectron2.py tools/
RUN if [ "$CUDA" != 1 ]; then INDEX="--extra-index-url https://download.pytorch.org/whl/cpu"; \
    sed -i -E 's/^(torch|torchvision)==([0-9.]+)/\1==\2+cpu/' requirements.txt; fi \
    && pip install $INDEX -r requirements.txt && python tools/install_detectron2.py
COPY . .
RUN if [ "$CUDA" = 1 ]; then export DN_DETR_FORCE_CUDA=1; fi \
    && if [ -z "$TORCH_CUDA_ARCH_LIST" ]; then unset TORCH_CUDA_ARCH_LIST; fi \
    && pip install --no-build-isolation --no-deps . && dn-detr doctor
# not root: what a container writes to a mounted folder belongs to the user of --user
RUN useradd --create-home detr
USER detr
WORKDIR /data
ENTRYPOINT ["dn-detr"]
CMD ["--help"]

# The project on Ray's own image, for Kubernetes (kuberay.yaml) or `docker run`. GPU nodes and CPU nodes take the same one;
# `--build-arg DEVICE=cpu` makes a smaller one without CUDA.
ARG DEVICE=gpu
FROM rayproject/ray:2.60.0-py311-${DEVICE}

WORKDIR /home/ray/zfnet-atlas
COPY --chown=ray:users pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=ray:users zfnet zfnet
COPY --chown=ray:users pipeline pipeline
COPY --chown=ray:users jobs jobs

# constraints.txt pins what the project needs, and what that needs; Ray stays the image's own, of the same version.
RUN pip install --no-cache-dir --constraint constraints.txt --editable .

CMD ["python", "jobs/demo.py", "--help"]

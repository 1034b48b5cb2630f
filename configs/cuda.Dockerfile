# A worker, which lends the GPUs that its container sees. From the repository's root, on a machine with NVIDIA's runtime:
#     docker build -f configs/cuda.Dockerfile -t azu-cuda .
#     docker run --gpus all --network host -e AZU_TICKET -v azu:/home/ray/.azu azu-cuda join --vram 20GiB --payout 0x...
# The volume keeps the shards, so that they are not fetched again.
FROM rayproject/ray:2.60.0-py311-gpu
# For example an index that has the build of torch for an older driver.
ARG PIP_OPTIONS=""
WORKDIR /home/ray/azu
COPY --chown=ray pyproject.toml README.md LICENSE ./
COPY --chown=ray azu ./azu
COPY --chown=ray actors ./actors
COPY --chown=ray deployments ./deployments
COPY --chown=ray configs ./configs
# Each package is the one of the lock file, by its hash; which build of torch fits depends on the machine.
RUN pip install --no-cache-dir $PIP_OPTIONS "torch>=2.8,<2.14"
RUN pip install --no-cache-dir $PIP_OPTIONS --require-hashes --no-deps -r configs/locks/node.txt
RUN pip install --no-cache-dir --no-deps --no-build-isolation .
# A package that is missing fails the build; its log shows the CUDA version of torch.
RUN azu join --help >/dev/null && python -c "import azu.engine.stage_runner, pynvml, torch; print('CUDA', torch.version.cuda)"
RUN mkdir -p "$HOME/.azu"
VOLUME /home/ray/.azu
ENTRYPOINT ["azu"]
CMD ["join", "--help"]

# The head, without a GPU: a network's control plane, its books and its endpoint. From the repository's root:
#     docker build -f configs/head.Dockerfile -t azu-head .
#     docker run --network host -v azu:/home/ray/.azu azu-head up --ip ADDRESS
# The volume holds the ledger and the platform's key; all other files can be made again.
FROM rayproject/ray:2.60.0-py311-cpu
# For example an index that has the CPU build of torch, which is smaller by gigabytes.
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
# A package that is missing fails the build.
RUN azu --help >/dev/null && python -c "import deployments.app, azu.engine.stage_runner; from azu.launch.redis_server import server_executable; server_executable()"
# Volumes keep their owners' numbers: in every image the users of the money and of Ray have these.
USER root
RUN groupadd --gid 10001 azu-money && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin azu-money
RUN groupadd --gid 10002 azu-ray && useradd --uid 10002 --gid 10002 --no-log-init --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin azu-ray
USER ray
# Volumes take these folders' owner. The users of the money and of Ray read Python from this home.
RUN mkdir -p "$HOME/.azu/serve" && chmod 755 "$HOME"
VOLUME /home/ray/.azu
EXPOSE 8000
ENTRYPOINT ["azu"]
CMD ["up"]

# The broker, its commands, and the demo's services; one image.
#
# The base is pinned by tag. Where images are built, pin it by digest as well (FROM python:TAG@sha256:...): this file
# was written without a registry at hand, so there was no digest to take down.

FROM python:3.11.14-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1
WORKDIR /src
# Dependencies first: this layer changes only when they do.
COPY requirements/broker.txt requirements/build.txt requirements/
RUN python -m venv /opt/carnet \
 && /opt/carnet/bin/python -m pip install --require-hashes -r requirements/broker.txt \
 && python -m venv /opt/build \
 && /opt/build/bin/python -m pip install --require-hashes -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY broker broker
COPY certs/scripts certs/scripts
RUN /opt/build/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
 && /opt/carnet/bin/python -m pip install --no-deps --no-index /dist/carnet-*.whl \
 # Nothing is installed at run time.
 && /opt/carnet/bin/python -m pip uninstall --yes pip setuptools \
 # Folders for volumes: a new named volume takes the owner of the folder that it is mounted on.
 && install -d -o 65532 -g 65532 -m 0700 /volumes/identities /volumes/audit /volumes/store

FROM python:3.11.14-slim-bookworm
LABEL org.opencontainers.image.title="carnet" \
      org.opencontainers.image.description="Broker for short-lived, audience-scoped, certificate-bound tokens" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/carnet /opt/carnet
COPY --from=build /volumes/identities /var/lib/carnet/identities
COPY --from=build /volumes/audit /var/lib/carnet/audit
COPY --from=build /volumes/store /var/lib/carnet/store
COPY certs/scripts /opt/carnet/certs/scripts
# The root file system can be mounted read-only: modules were compiled when they were installed.
ENV PATH=/opt/carnet/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# A number, so that an orchestrator can tell that it is not root.
USER 65532:65532
WORKDIR /var/lib/carnet
EXPOSE 8443 8444
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=20s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/livez', timeout=2)"]
# No entry point: a CI job runs carnet-broker keys rotate in this image, or a shell.
CMD ["carnet-broker", "serve", "--config", "/etc/carnet/broker.yaml"]

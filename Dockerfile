# Two stages: the package and its dependencies are built in the first, the second carries only what runs.
ARG PYTHON=3.13.9-slim-bookworm

FROM python:${PYTHON} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY condor_lite condor_lite
RUN python -m venv /opt/condor && /opt/condor/bin/pip install --no-cache-dir .

FROM python:${PYTHON}
# Nothing but /data and /tmp is ever written; /game is for a config.toml and a models/ folder of your own.
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /game condor \
    && mkdir /game /data && chown condor:condor /data && chmod 700 /data
COPY --from=build /opt/condor /opt/condor
# These stand above config.toml. Here alone, inside the container, it listens on every address.
ENV PATH=/opt/condor/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    CONDOR_LITE__REPORT__HOST=0.0.0.0 \
    CONDOR_LITE__REPORT__PORT=8000 \
    CONDOR_LITE__STORAGE__PATH=/data/condor.db \
    CONDOR_LITE__BACKUP__PATH=/data/backups
USER 10001:10001
WORKDIR /game
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
# http.client, unlike urllib, asks no proxy that the environment names.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import http.client as h, os; c = h.HTTPConnection('127.0.0.1', int(os.environ['CONDOR_LITE__REPORT__PORT']), timeout=4); c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "condor_lite"]

# Two stages: the wheel and its dependencies are built in the first, the second carries only what runs.
FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY condor_lite condor_lite
RUN python -m venv /opt/condor && /opt/condor/bin/pip install --no-cache-dir .

FROM python:3.13-slim
RUN useradd --system --uid 10001 --create-home --home-dir /game condor \
    && mkdir -p /game/data && chown -R condor:condor /game
COPY --from=build /opt/condor /opt/condor
ENV PATH=/opt/condor/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    CONDOR_LITE__REPORT__HOST=0.0.0.0 \
    CONDOR_LITE__STORAGE__PATH=/game/data/condor.db
USER condor
WORKDIR /game
# Mount a config.toml and a models/ folder into /game; without them the demo runs.
VOLUME /game/data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["python", "-m", "condor_lite"]

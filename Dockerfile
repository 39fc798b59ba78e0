# The gateway (and, by another command, an emulated engine): no compiler, no root.
FROM python:3.11.13-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/tiergate
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY engine engine
COPY scheduling scheduling
COPY profiles profiles
COPY state state
COPY adapters adapters
COPY gateway gateway
COPY simulator simulator
COPY workloads workloads
COPY loadgen loadgen
COPY workloads workloads
COPY tiergate tiergate
RUN /opt/tiergate/bin/pip install --no-cache-dir -c constraints.txt ".[embedded,tokenizer]"

FROM python:3.11.13-slim-bookworm
RUN useradd --system --uid 10001 --create-home tiergate
COPY --from=build /opt/tiergate /opt/tiergate
ENV PATH=/opt/tiergate/bin:$PATH PYTHONUNBUFFERED=1
USER tiergate
WORKDIR /home/tiergate
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s --retries=5 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
ENTRYPOINT ["tiergate"]
CMD ["serve", "--help"]

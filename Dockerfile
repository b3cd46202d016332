# The three services and the command; which one runs is the container's command.

FROM python:3.11-slim-trixie AS build
WORKDIR /src
RUN python -m venv /opt/sluice
ENV PATH=/opt/sluice/bin:$PATH
COPY requirements.txt .
RUN pip install --no-cache-dir --require-hashes -r requirements.txt
COPY pyproject.toml README.md LICENSE schema.sql ./
COPY collector collector
COPY flusher flusher
COPY orderbook orderbook
COPY sluice sluice
COPY migrations migrations
COPY deploy/systemd deploy/systemd
COPY docs/operations.md docs/operations.md
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    # What only development needs stays behind.
    && pip uninstall --yes asyncpg-stubs grimp hatchling hypothesis import-linter mypy pytest \
        pytest-asyncio pytest-timeout pytest-xdist execnet ruff types-PyYAML pip

FROM python:3.11-slim-trixie
RUN useradd --system --uid 10001 --no-create-home sluice \
    && install --directory --owner=sluice /var/lib/sluice
COPY --from=build /opt/sluice /opt/sluice
ENV PATH=/opt/sluice/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /var/lib/sluice
USER sluice
CMD ["sluice", "--help"]

# The two commands of a fresh machine are `make run` and `make test`; what they need they bring.

VENV = .venv
BIN = $(VENV)/bin
PYTHON ?=
PACKAGES = collector flusher orderbook sluice

.PHONY: run test check stop clean completeness books kills collector-kills outages failpoints \
    chaos mutants bench docs screens

# make run [SYMBOLS=binance:BTCUSDT,binance:ETHUSDT] [SECONDS=60]
# Without SYMBOLS it records the simulator, in a database of its own.
run: $(VENV)/.installed
	@exec $(BIN)/sluice run $(if $(SECONDS),--seconds $(SECONDS))

# make test [ARGS='-k flusher -x']; two files at a time, for most of them wait most of the time.
test: $(VENV)/.installed
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy $(PACKAGES) tests $(wildcard benchmarks)
	$(BIN)/lint-imports
	deploy/check

# The long forms of what `make test` runs short; each prints a line a seed, a step or a row.
completeness: $(VENV)/.installed
	SEEDS=$(or $(SEEDS),50) SECONDS=$(or $(SECONDS),5) \
	    $(BIN)/pytest -s tests/acceptance/test_completeness.py -k under_faults

books: $(VENV)/.installed
	SEEDS=$(or $(SEEDS),50) $(BIN)/pytest -s tests/acceptance/test_orderbook.py -k no_row

kills: $(VENV)/.installed
	SLUICE_FLUSHER_KILLS=$(or $(HITS),50) $(BIN)/pytest -s tests/acceptance/test_flusher.py -k killed

# make outages [SECONDS=30]; how long each lasts. A line an outage, with the time of the recovery.
outages: $(VENV)/.installed
	SLUICE_OUTAGE_SECONDS=$(or $(SECONDS),30) \
	    $(BIN)/pytest -s tests/acceptance/test_outages.py -k each_outage

collector-kills: $(VENV)/.installed
	SLUICE_COLLECTOR_KILLS=$(or $(HITS),50) \
	    $(BIN)/pytest -s tests/acceptance/test_completeness.py -k killed_at_any_step

# make failpoints [HITS=5]: every place x {killed, fails, hangs}, a line a hit.
failpoints: $(VENV)/.installed
	HITS=$(or $(HITS),5) $(BIN)/pytest -s tests/acceptance/test_failpoints.py

# make chaos [SEEDS=20] [SECONDS=30] [FIRST=1]; 1 is a violation, 3 too little to judge by.
chaos: $(VENV)/.installed
	$(BIN)/python -m tests.chaos --seeds $(or $(SEEDS),20) --seconds $(or $(SECONDS),30) \
	    --first $(or $(FIRST),1)

# Breaks the code in known ways, each in a copy, and must see the named tests fail.
mutants: $(VENV)/.installed
	$(BIN)/python -m tests.mutants $(MUTANTS)

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.books
	$(BIN)/python -m benchmarks.books --faults 10000000
	$(BIN)/python -m benchmarks.many_books
	$(BIN)/python -m benchmarks.flusher
	$(BIN)/python -m benchmarks.storage

# Writes the pages of docs/ that are made by commands; screens needs servers as run does.
docs: $(VENV)/.installed
	$(BIN)/python -m sluice.cli.configuration >docs/configuration.md
	$(BIN)/python -m sluice.cli.commands >docs/commands.md

screens: $(VENV)/.installed
	deploy/screens

# Ends a recording and the servers that `make run` brought; their data stays.
stop: $(VENV)/.installed
	@$(BIN)/sluice stop

# Removes what can be made again. The recorded data, in .services and .sluice, stays.
clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist
	find $(PACKAGES) tests -name __pycache__ -prune -exec rm -rf {} +

# Of all that pip prints, the names of packages are shown as it comes to them; the rest if it fails.
$(VENV)/.installed: requirements.txt
	@python=; for name in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	    if $$name -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	        2>/dev/null; then python=$$name; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "Python 3.11 or later with its venv module is needed (on Debian: python3-venv)" >&2; \
	    exit 1; \
	fi; \
	echo "making $(VENV) with $$($$python --version)"; \
	$$python -m venv $(VENV)
	@{ $(BIN)/pip install --disable-pip-version-check --require-hashes -r requirements.txt 2>&1 && \
	   $(BIN)/pip install --disable-pip-version-check --no-deps --no-build-isolation -e . 2>&1 || \
	   echo "pip failed"; } | awk ' \
	    { said = said "\n" $$0 } \
	    /^Collecting/ { sub(/[=<>~!;\[].*/, "", $$2); printf " %s", $$2; fflush() } \
	    /^Installing collected packages/ { printf "\ninstalling\n"; fflush() } \
	    END { if ($$0 == "pip failed") { print said; exit 1 } }'
	@touch $@

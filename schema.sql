-- The database of Sluice, for both editions of TimescaleDB (2.19 or later), PostgreSQL 15 or later.
--
-- Run it any number of times: `psql -v ON_ERROR_STOP=1 -f schema.sql`. It is one transaction, it
-- changes nothing that is already there, and it takes no lock that a running writer holds.
-- It refuses a database of an older version, which `sluice db upgrade` brings up by migrations/.
--
-- Conventions
--   time         the exchange's clock, the time the row is about; received_at is ours
--   price, size  numeric, exactly the decimals that the exchange sent
--   side         the aggressor's: 'buy' or 'sell'
--   CHECK        `x < 'Infinity'` also refuses NaN, which PostgreSQL sorts above Infinity
--
-- No foreign keys lead from a hypertable: they deadlock where chunks are created.

BEGIN;

SET LOCAL client_min_messages = warning;

-- Two runs at once wait for each other.
DO $$ BEGIN PERFORM pg_advisory_xact_lock(hashtext('sluice.schema')); END $$;

CREATE EXTENSION IF NOT EXISTS timescaledb;

-- Roles ----------------------------------------------------------------------------------------

-- A login role gets its rights by membership (GRANT sluice_flusher TO ...), or one of these is
-- given a password and used as it is: only then do the settings of sluice_reader apply.
-- sluice_owner may log in because the background jobs of its tables run under its name.
DO $$
DECLARE
    wanted record;
BEGIN
    FOR wanted IN
        SELECT * FROM (VALUES
            ('sluice_owner', 'LOGIN'), ('sluice_flusher', 'NOLOGIN'), ('sluice_reader', 'NOLOGIN')
        ) AS roles (name, login)
    LOOP
        CONTINUE WHEN EXISTS (SELECT FROM pg_roles WHERE rolname = wanted.name);
        BEGIN
            EXECUTE format('CREATE ROLE %I %s', wanted.name, wanted.login);
        EXCEPTION
            WHEN insufficient_privilege THEN
                RAISE WARNING 'role % is not there and % may not create it',
                    wanted.name, current_user;
            WHEN duplicate_object OR unique_violation THEN
                NULL; -- another database of this cluster was faster
        END;
    END LOOP;
END $$;

-- Everything below belongs to the owner of what is there already, else to sluice_owner, else to
-- whoever runs this.
DO $$
DECLARE
    owner name := coalesce(
        (SELECT tableowner FROM pg_tables WHERE schemaname = 'public' AND tablename = 'trades'),
        'sluice_owner');
BEGIN
    IF owner <> current_user AND EXISTS (SELECT FROM pg_roles WHERE rolname = owner)
        AND pg_has_role(current_user, owner, 'MEMBER')
    THEN
        IF NOT has_schema_privilege(owner, 'public', 'CREATE') THEN
            EXECUTE format('GRANT CREATE ON SCHEMA public TO %I', owner);
        END IF;
        EXECUTE format('SET LOCAL ROLE %I', owner);
    END IF;
END $$;

-- Version --------------------------------------------------------------------------------------

CREATE TABLE IF NOT EXISTS schema_version (
    version integer PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);

DO $$
DECLARE
    ours constant integer := 2;
    theirs integer := (SELECT max(version) FROM schema_version);
BEGIN
    IF theirs <> ours THEN
        RAISE EXCEPTION 'this schema.sql is version %, the database is at version %', ours, theirs
            USING HINT = CASE WHEN theirs < ours
                THEN 'Run: sluice db upgrade' ELSE 'Install the release that made it.' END;
    END IF;
    INSERT INTO schema_version (version) VALUES (ours) ON CONFLICT DO NOTHING;
END $$;

-- Tables ---------------------------------------------------------------------------------------

CREATE TABLE IF NOT EXISTS markets (
    market_id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    exchange text NOT NULL CHECK (exchange <> ''),
    symbol text NOT NULL CHECK (symbol <> ''),
    id_kind text NOT NULL CHECK (id_kind IN ('raw', 'agg', 'last', 'seq', 'opaque')),
    created_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (exchange, symbol)
);

CREATE TABLE IF NOT EXISTS trades (
    time timestamptz NOT NULL,
    trade_id bigint NOT NULL,
    first_id bigint NOT NULL,
    received_at timestamptz NOT NULL,
    market_id integer NOT NULL,
    side text NOT NULL CHECK (side IN ('buy', 'sell')),
    price numeric NOT NULL CHECK (price > 0 AND price < 'Infinity'),
    quantity numeric NOT NULL CHECK (quantity > 0 AND quantity < 'Infinity'),
    CHECK (first_id <= trade_id)
);

CREATE TABLE IF NOT EXISTS orderbook_snapshots (
    time timestamptz NOT NULL,
    update_id bigint NOT NULL,
    sync_id bigint NOT NULL,
    event_time timestamptz NOT NULL,
    received_at timestamptz NOT NULL,
    market_id integer NOT NULL,
    trusted_depth integer NOT NULL CHECK (trusted_depth >= 0),
    bid_prices numeric [] NOT NULL,
    bid_sizes numeric [] NOT NULL,
    ask_prices numeric [] NOT NULL,
    ask_sizes numeric [] NOT NULL,
    CHECK (cardinality(bid_prices) = cardinality(bid_sizes)),
    CHECK (cardinality(ask_prices) = cardinality(ask_sizes)),
    CONSTRAINT orderbook_snapshots_not_crossed CHECK (bid_prices[1] < ask_prices[1]),
    CONSTRAINT orderbook_snapshots_levels_check CHECK (
        0 < ALL (bid_prices) AND 'Infinity' > ALL (bid_prices)
        AND 0 < ALL (bid_sizes) AND 'Infinity' > ALL (bid_sizes)
        AND 0 < ALL (ask_prices) AND 'Infinity' > ALL (ask_prices)
        AND 0 < ALL (ask_sizes) AND 'Infinity' > ALL (ask_sizes)
        AND array_position(bid_prices || bid_sizes || ask_prices || ask_sizes, NULL) IS NULL
    )
);

CREATE TABLE IF NOT EXISTS klines (
    time timestamptz NOT NULL,
    close_time timestamptz NOT NULL,
    trade_count bigint NOT NULL CHECK (trade_count >= 0),
    first_trade_id bigint NOT NULL,
    last_trade_id bigint NOT NULL,
    received_at timestamptz NOT NULL,
    market_id integer NOT NULL,
    interval text NOT NULL,
    open numeric NOT NULL,
    high numeric NOT NULL CHECK (high < 'Infinity'),
    low numeric NOT NULL CHECK (low > 0),
    close numeric NOT NULL,
    volume numeric NOT NULL CHECK (volume >= 0 AND volume < 'Infinity'),
    quote_volume numeric NOT NULL CHECK (quote_volume >= 0 AND quote_volume < 'Infinity'),
    taker_buy_volume numeric NOT NULL CHECK (taker_buy_volume BETWEEN 0 AND volume),
    taker_buy_quote_volume numeric NOT NULL
        CHECK (taker_buy_quote_volume >= 0 AND taker_buy_quote_volume < 'Infinity'),
    CHECK (low <= least(open, close) AND high >= greatest(open, close)),
    CHECK (time < close_time)
);

CREATE TABLE IF NOT EXISTS tickers (
    time timestamptz NOT NULL,
    trade_count bigint CHECK (trade_count >= 0),
    received_at timestamptz NOT NULL,
    market_id integer NOT NULL,
    kind text NOT NULL CHECK (kind IN ('ticker', 'miniTicker')),
    last_price numeric NOT NULL CHECK (last_price >= 0 AND last_price < 'Infinity'),
    open numeric NOT NULL CHECK (open >= 0 AND open < 'Infinity'),
    high numeric NOT NULL CHECK (high >= 0 AND high < 'Infinity'),
    low numeric NOT NULL CHECK (low >= 0 AND low < 'Infinity'),
    volume numeric NOT NULL CHECK (volume >= 0 AND volume < 'Infinity'),
    quote_volume numeric NOT NULL CHECK (quote_volume >= 0 AND quote_volume < 'Infinity'),
    bid_price numeric CHECK (bid_price >= 0 AND bid_price < 'Infinity'),
    bid_size numeric CHECK (bid_size >= 0 AND bid_size < 'Infinity'),
    ask_price numeric CHECK (ask_price >= 0 AND ask_price < 'Infinity'),
    ask_size numeric CHECK (ask_size >= 0 AND ask_size < 'Infinity')
);

CREATE TABLE IF NOT EXISTS gaps (
    gap_id text PRIMARY KEY,
    market_id integer NOT NULL,
    channel text NOT NULL,
    from_id bigint,
    to_id bigint,
    from_time timestamptz,
    to_time timestamptz,
    cause text NOT NULL,
    status text NOT NULL CHECK (status IN ('open', 'filled', 'absent', 'lost')),
    tries integer NOT NULL CHECK (tries >= 0),
    revision bigint NOT NULL CHECK (revision >= 0),
    opened_at timestamptz NOT NULL,
    closed_at timestamptz,
    CHECK (from_id <= to_id),
    CHECK (from_time <= to_time)
);

CREATE TABLE IF NOT EXISTS book_audits (
    market_id integer NOT NULL,
    time timestamptz NOT NULL,
    update_id bigint NOT NULL,
    levels_compared integer NOT NULL CHECK (levels_compared >= 0),
    levels_different integer NOT NULL CHECK (levels_different BETWEEN 0 AND levels_compared),
    detail jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (market_id, time)
);

-- Where trades came in so late that candles over them may be stored already: a row an hour of a
-- batch, written by the flusher with the trades. `sluice maintain` makes those candles again and
-- takes the row away.
CREATE TABLE IF NOT EXISTS late_ranges (
    late_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    from_time timestamptz NOT NULL,
    to_time timestamptz NOT NULL,
    market_ids integer [] NOT NULL,
    CHECK (from_time <= to_time)
);

-- Hypertables ----------------------------------------------------------------------------------

-- One index a table, the key: PostgreSQL reads it backwards just as well, and a second index
-- costs a quarter of the rows a second. What is there already is left as it is.
DO $$
DECLARE
    wanted record;
    is_community boolean := current_setting('timescaledb.license', true) = 'timescale';
BEGIN
    FOR wanted IN
        SELECT * FROM (VALUES
            ('trades', INTERVAL '1 day', 'market_id', 'time, trade_id'),
            ('orderbook_snapshots', INTERVAL '1 day', 'market_id', 'time'),
            ('klines', INTERVAL '30 days', 'market_id, interval', 'time'),
            ('tickers', INTERVAL '1 day', 'market_id, kind', 'time')
        ) AS hypertables (name, chunk, segment_by, order_by)
    LOOP
        IF NOT EXISTS (
            SELECT FROM timescaledb_information.hypertables
            WHERE hypertable_schema = 'public' AND hypertable_name = wanted.name
        ) THEN
            PERFORM create_hypertable(
                wanted.name::regclass, by_range('time', wanted.chunk),
                create_default_indexes => false);
        END IF;
        IF to_regclass(format('public.%I', wanted.name || '_key')) IS NULL THEN
            EXECUTE format(
                'CREATE UNIQUE INDEX %I ON %I (%s, %s)',
                wanted.name || '_key', wanted.name, wanted.segment_by, wanted.order_by);
        END IF;
        IF is_community AND NOT EXISTS (
            SELECT FROM timescaledb_information.hypertables
            WHERE hypertable_schema = 'public' AND hypertable_name = wanted.name
                AND compression_enabled
        ) THEN
            EXECUTE format(
                'ALTER TABLE %I SET (timescaledb.compress, timescaledb.compress_segmentby = %L,'
                ' timescaledb.compress_orderby = %L)',
                wanted.name, wanted.segment_by, wanted.order_by);
            EXECUTE format(
                'SELECT add_compression_policy(%L, INTERVAL ''7 days'', if_not_exists => true)',
                wanted.name);
        END IF;
    END LOOP;
END $$;

-- Candles --------------------------------------------------------------------------------------

-- The same names and columns on both editions. On Community they are continuous aggregates, each
-- made of the one below it. On Apache they are plain views of trades and, for the days that
-- refresh_candles() has kept, of candles_kept. A row of trades may stand for several
-- (first_id < trade_id). Where the edition has changed since, the other kind is replaced.
--
-- CALL refresh_candles(from, to) brings the stored candles of this range up to date with late rows,
-- as far as buckets are closed and trades have not been dropped. On Apache it also keeps the
-- candles of every closed day up to `to`: call it before trades are dropped, and drop whole kept
-- days only. With a third argument the Apache edition makes candles of these markets only, and
-- keeps no further day.
--
-- `sluice maintain` calls it. What it relies on: a trade that is more than an hour old when it is
-- committed stands in late_ranges (the flusher says so of every trade older than half an hour).
DO $$
DECLARE
    level record;
    is_community boolean := current_setting('timescaledb.license', true) = 'timescale';
    compressed bigint;
    oldest timestamptz;
    drop_after interval := (
        SELECT config ->> 'drop_after' FROM timescaledb_information.jobs
        WHERE proc_name = 'policy_retention'
            AND hypertable_schema = 'public' AND hypertable_name = 'trades');
    of_trades text := $query$
        SELECT market_id, time_bucket(INTERVAL '%1$s', time) AS time,
            first(price, trade_id) AS open, max(price) AS high,
            min(price) AS low, last(price, trade_id) AS close,
            sum(quantity) AS volume, sum(price * quantity) AS quote_volume,
            sum(trade_id - first_id + 1)::bigint AS trade_count,
            coalesce(sum(quantity) FILTER (WHERE side = 'buy'), 0) AS taker_buy_volume
        FROM trades %2$s GROUP BY 1, 2
    $query$;
    of_candles text := $query$
        SELECT market_id, time_bucket(INTERVAL '%1$s', time) AS time,
            first(open, time) AS open, max(high) AS high,
            min(low) AS low, last(close, time) AS close,
            sum(volume) AS volume, sum(quote_volume) AS quote_volume,
            sum(trade_count)::bigint AS trade_count,
            sum(taker_buy_volume) AS taker_buy_volume
        FROM %3$I %2$s GROUP BY 1, 2
    $query$;
BEGIN
    IF NOT is_community THEN
        SELECT count(*) INTO compressed FROM timescaledb_information.chunks WHERE is_compressed;
        IF compressed > 0 THEN
            RAISE EXCEPTION '% chunks are compressed: the Apache edition cannot read them',
                compressed
                USING HINT = 'Go back to the Community edition and decompress them first.';
        END IF;
        CREATE TABLE IF NOT EXISTS candles_kept (
            market_id integer NOT NULL,
            time timestamptz NOT NULL,
            open numeric NOT NULL,
            high numeric NOT NULL,
            low numeric NOT NULL,
            close numeric NOT NULL,
            volume numeric NOT NULL,
            quote_volume numeric NOT NULL,
            trade_count bigint NOT NULL,
            taker_buy_volume numeric NOT NULL,
            PRIMARY KEY (market_id, time)
        );
        -- One row: the candles before it are read from candles_kept, the others from trades.
        CREATE TABLE IF NOT EXISTS candles_kept_until (
            until timestamptz NOT NULL,
            is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only)
        );
        INSERT INTO candles_kept_until (until) VALUES ('-infinity') ON CONFLICT DO NOTHING;
    END IF;

    -- From the top down, as each continuous aggregate holds the one below it.
    FOR level IN
        SELECT c.relname AS name, a.view_name IS NOT NULL AS is_aggregate
        FROM unnest(ARRAY['candles_1d', 'candles_1h', 'candles_5m', 'candles_1m'])
            WITH ORDINALITY AS wanted (name, place)
        JOIN pg_class AS c ON c.oid = to_regclass('public.' || wanted.name)
        LEFT JOIN timescaledb_information.continuous_aggregates AS a
            ON a.view_schema = 'public' AND a.view_name = wanted.name
        ORDER BY wanted.place
    LOOP
        IF level.is_aggregate AND NOT is_community THEN
            IF level.name = 'candles_1m' THEN
                -- The days whose trades have been dropped, whole or in part, would be lost.
                SELECT least(
                    time_bucket(INTERVAL '1 day', min(range_start) - INTERVAL '1 us')
                    + INTERVAL '1 day',
                    time_bucket(INTERVAL '1 day', now())) INTO oldest
                FROM timescaledb_information.chunks
                WHERE hypertable_schema = 'public' AND hypertable_name = 'trades';
                INSERT INTO candles_kept
                SELECT * FROM candles_1m WHERE time < oldest
                ON CONFLICT DO NOTHING;
                UPDATE candles_kept_until SET until = oldest;
            END IF;
            EXECUTE format('DROP MATERIALIZED VIEW %I', level.name);
        ELSIF is_community AND NOT level.is_aggregate THEN
            EXECUTE format('DROP VIEW %I', level.name);
            IF level.name = 'candles_1m' AND EXISTS (SELECT FROM candles_kept) THEN
                RAISE WARNING 'candles whose trades were dropped stay in candles_kept only';
            END IF;
        END IF;
    END LOOP;

    FOR level IN
        SELECT * FROM (VALUES
            ('candles_1m', '1 minute', NULL, INTERVAL '1 hour', INTERVAL '10 minutes'),
            ('candles_5m', '5 minutes', 'candles_1m', INTERVAL '1 hour', INTERVAL '10 minutes'),
            ('candles_1h', '1 hour', 'candles_5m', INTERVAL '2 hours', INTERVAL '30 minutes'),
            ('candles_1d', '1 day', 'candles_1h', INTERVAL '1 day', INTERVAL '1 hour')
        ) AS levels (name, width, source, end_offset, schedule)
    LOOP
        CONTINUE WHEN to_regclass('public.' || level.name) IS NOT NULL;
        IF NOT is_community THEN
            EXECUTE format('CREATE VIEW %I AS ', level.name)
                || CASE WHEN level.source IS NULL
                    THEN 'SELECT * FROM candles_kept'
                        ' WHERE time < (SELECT until FROM candles_kept_until)'
                    ELSE format(of_candles, level.width,
                        'WHERE time < (SELECT until FROM candles_kept_until)', 'candles_kept')
                    END
                || ' UNION ALL '
                || format(of_trades, level.width,
                    'WHERE time >= (SELECT until FROM candles_kept_until)');
            CONTINUE;
        END IF;
        EXECUTE format(
            'CREATE MATERIALIZED VIEW %I WITH (timescaledb.continuous,'
            ' timescaledb.materialized_only = false) AS ', level.name)
            || format(
                CASE WHEN level.source IS NULL THEN of_trades ELSE of_candles END,
                level.width, '', level.source)
            || ' WITH NO DATA';
        -- Without a lower bound every late row is caught up with. Where trades are dropped the
        -- bound is below their age: a refresh over dropped rows deletes their candles.
        -- Newest first, which is usual since 2.21, hides what a first refresh has not come to yet.
        EXECUTE format(
            'SELECT add_continuous_aggregate_policy(%L, start_offset => %L::interval,'
            ' end_offset => %L::interval, schedule_interval => %L::interval %s)',
            level.name, CASE WHEN level.source IS NULL THEN drop_after - INTERVAL '1 day' END,
            level.end_offset, level.schedule,
            CASE WHEN EXISTS (
                SELECT FROM pg_proc WHERE proname = 'add_continuous_aggregate_policy'
                    AND 'refresh_newest_first' = ANY (proargnames)
            ) THEN ', refresh_newest_first => false' ELSE '' END);
    END LOOP;

    IF is_community THEN
        EXECUTE format($definition$
        CREATE OR REPLACE PROCEDURE refresh_candles(
            from_time timestamptz, to_time timestamptz, of_markets integer [] DEFAULT NULL
        ) LANGUAGE plpgsql AS $procedure$
        DECLARE
            level record;
            -- A refresh over dropped rows would delete their candles.
            whole_from timestamptz := greatest(
                (SELECT min(range_start) FROM timescaledb_information.chunks
                WHERE hypertable_schema = 'public' AND hypertable_name = 'trades'),
                (SELECT now() - (config ->> 'drop_after')::interval
                FROM timescaledb_information.jobs
                WHERE proc_name = 'policy_retention' AND hypertable_name = 'trades'));
        BEGIN
            FOR level IN
                SELECT name,
                    greatest(
                        time_bucket(INTERVAL '1 day', from_time),
                        time_bucket(INTERVAL '1 day', whole_from - INTERVAL '1 us')
                        + INTERVAL '1 day') AS from_bucket,
                    least(
                        time_bucket(INTERVAL '1 day', to_time) + INTERVAL '1 day',
                        time_bucket(width, now() - INTERVAL '1 hour')) AS to_bucket
                FROM (VALUES
                    ('candles_1m', INTERVAL '1 minute'), ('candles_5m', INTERVAL '5 minutes'),
                    ('candles_1h', INTERVAL '1 hour'), ('candles_1d', INTERVAL '1 day')
                ) AS levels (name, width)
            LOOP
                IF level.from_bucket < level.to_bucket THEN
                    CALL refresh_continuous_aggregate(
                        level.name::regclass, level.from_bucket, level.to_bucket %s);
                END IF;
            END LOOP;
        END $procedure$
        $definition$,
            CASE WHEN EXISTS (
                SELECT FROM pg_proc WHERE proname = 'refresh_continuous_aggregate'
                    AND 'options' = ANY (proargnames)
            ) THEN $options$
                        , options => '{"refresh_newest_first": false, "buckets_per_batch": 1440}'
                        $options$
            ELSE '' END);
    ELSE
        EXECUTE $definition$
        CREATE OR REPLACE PROCEDURE refresh_candles(
            from_time timestamptz, to_time timestamptz, of_markets integer [] DEFAULT NULL
        ) LANGUAGE plpgsql
        -- So that the plan knows the range and the markets.
        SET plan_cache_mode = force_custom_plan
        AS $procedure$
        DECLARE
            kept_until timestamptz := (SELECT until FROM candles_kept_until FOR UPDATE);
            keep_until timestamptz := CASE
                WHEN of_markets IS NOT NULL THEN kept_until
                ELSE greatest(kept_until, least(
                    time_bucket(INTERVAL '1 day', to_time) + INTERVAL '1 day',
                    time_bucket(INTERVAL '1 day', now() - INTERVAL '1 hour')))
                END;
            first_minute timestamptz := time_bucket(INTERVAL '1 minute', CASE
                WHEN keep_until > kept_until THEN least(from_time, kept_until) ELSE from_time END);
            end_minute timestamptz := CASE
                WHEN keep_until > kept_until THEN keep_until
                ELSE least(
                    time_bucket(INTERVAL '1 minute', to_time) + INTERVAL '1 minute', kept_until)
                END;
        BEGIN
            INSERT INTO candles_kept AS kept
        $definition$
        || format(of_trades, '1 minute',
            'WHERE time >= first_minute AND time < end_minute'
            ' AND (of_markets IS NULL OR market_id = ANY (of_markets))')
        || $definition$
            ON CONFLICT (market_id, time) DO UPDATE SET
                open = excluded.open, high = excluded.high, low = excluded.low,
                close = excluded.close, volume = excluded.volume,
                quote_volume = excluded.quote_volume, trade_count = excluded.trade_count,
                taker_buy_volume = excluded.taker_buy_volume
            -- Fewer trades than before: their rows have been dropped, and the candle is right.
            WHERE excluded.trade_count > kept.trade_count;
            UPDATE candles_kept_until SET until = keep_until WHERE until < keep_until;
        END $procedure$
        $definition$;
    END IF;
END $$;

-- Reading --------------------------------------------------------------------------------------

-- The id of a market, so that queries read as people think; NULL where there is none.
CREATE OR REPLACE FUNCTION market(exchange text, symbol text) RETURNS integer
LANGUAGE sql STABLE STRICT PARALLEL SAFE
BEGIN ATOMIC
    SELECT m.market_id FROM public.markets AS m
    WHERE m.exchange = market.exchange AND m.symbol = market.symbol;
END;

-- The touch of every snapshot that has both sides. microprice leans to the side with less size;
-- imbalance runs from -1 (all asks) to 1 (all bids).
CREATE OR REPLACE VIEW book_tops AS
SELECT
    market_id,
    time,
    bid_prices[1] AS bid_price,
    bid_sizes[1] AS bid_size,
    ask_prices[1] AS ask_price,
    ask_sizes[1] AS ask_size,
    (bid_prices[1] + ask_prices[1]) * 0.5 AS mid,
    2e4 * (ask_prices[1] - bid_prices[1]) / (bid_prices[1] + ask_prices[1]) AS spread_bps,
    (bid_prices[1] * ask_sizes[1] + ask_prices[1] * bid_sizes[1])
    / (bid_sizes[1] + ask_sizes[1]) AS microprice,
    (bid_sizes[1] - ask_sizes[1]) / (bid_sizes[1] + ask_sizes[1]) AS imbalance
FROM orderbook_snapshots
WHERE cardinality(bid_prices) > 0 AND cardinality(ask_prices) > 0;

-- One row a level of every snapshot: level 1 is the best, side is the resting side.
CREATE OR REPLACE VIEW book_levels AS
SELECT
    s.market_id, s.time, l.side, l.level, l.price, l.size,
    l.level <= s.trusted_depth AS is_trusted
FROM orderbook_snapshots AS s
CROSS JOIN LATERAL (
    SELECT 'bid' AS side, b.level::integer, b.price, b.size
    FROM unnest(s.bid_prices, s.bid_sizes) WITH ORDINALITY AS b (price, size, level)
    UNION ALL
    SELECT 'ask', a.level::integer, a.price, a.size
    FROM unnest(s.ask_prices, s.ask_sizes) WITH ORDINALITY AS a (price, size, level)
) AS l;

-- What it would have cost to trade `quantity` at market against the last snapshot at or before
-- `time`: how much of it the stored levels fill, at which average price, and how far in basis
-- points that is from the mid. No row where there is no such snapshot.
CREATE OR REPLACE FUNCTION trade_cost(
    market_id integer, "time" timestamptz, side text, quantity numeric
) RETURNS TABLE (
    book_time timestamptz, filled numeric, average_price numeric, cost numeric, slippage_bps numeric
)
LANGUAGE sql STABLE STRICT PARALLEL SAFE
BEGIN ATOMIC
    WITH book AS (
        SELECT
            s.time, (s.bid_prices[1] + s.ask_prices[1]) / 2 AS mid,
            CASE trade_cost.side WHEN 'buy' THEN s.ask_prices WHEN 'sell' THEN s.bid_prices END
                AS prices,
            CASE trade_cost.side WHEN 'buy' THEN s.ask_sizes WHEN 'sell' THEN s.bid_sizes END
                AS sizes
        FROM public.orderbook_snapshots AS s
        WHERE s.market_id = trade_cost.market_id AND s.time <= trade_cost.time
        ORDER BY s.time DESC
        LIMIT 1
    ),
    fills AS (
        SELECT
            book.time, book.mid, l.price,
            least(l.size, trade_cost.quantity - coalesce(
                sum(l.size) OVER (
                    ORDER BY l.level ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0)) AS size
        FROM book
        CROSS JOIN LATERAL unnest(book.prices, book.sizes)
            WITH ORDINALITY AS l (price, size, level)
    )
    SELECT
        f.time, sum(f.size), sum(f.price * f.size) / sum(f.size), sum(f.price * f.size),
        1e4 * abs(sum(f.price * f.size) / sum(f.size) / f.mid - 1)
    FROM fills AS f
    WHERE f.size > 0
    GROUP BY f.time, f.mid;
END;

-- Rights ---------------------------------------------------------------------------------------

-- The flusher adds rows, and replaces gaps; the reader reads. A right that is there already is not
-- granted again: on a hypertable that would touch every chunk.
DO $$
DECLARE
    wanted record;
BEGIN
    FOR wanted IN
        SELECT r.role, t.name, p.privilege
        FROM (VALUES ('sluice_flusher'), ('sluice_reader')) AS r (role)
        CROSS JOIN (VALUES
            ('schema_version', false, false), ('markets', true, false), ('trades', true, false),
            ('orderbook_snapshots', true, false), ('klines', true, false),
            ('tickers', true, false), ('gaps', true, true), ('book_audits', true, false),
            ('late_ranges', true, false),
            ('candles_1m', false, false), ('candles_5m', false, false),
            ('candles_1h', false, false), ('candles_1d', false, false),
            ('book_tops', false, false), ('book_levels', false, false)
        ) AS t (name, is_filled, is_replaced)
        CROSS JOIN (VALUES ('SELECT'), ('INSERT'), ('UPDATE')) AS p (privilege)
        WHERE EXISTS (SELECT FROM pg_roles WHERE rolname = r.role)
            AND (p.privilege = 'SELECT'
                OR r.role = 'sluice_flusher' AND p.privilege = 'INSERT' AND t.is_filled
                OR r.role = 'sluice_flusher' AND p.privilege = 'UPDATE' AND t.is_replaced)
            AND NOT has_table_privilege(r.role, format('public.%I', t.name), p.privilege)
    LOOP
        EXECUTE format(
            'GRANT %s ON %I TO %I', wanted.privilege, wanted.name, wanted.role);
    END LOOP;
END $$;

RESET ROLE;

-- Kept to this database, so that two databases of one cluster do not write the same row.
DO $$
BEGIN
    EXECUTE format(
        'ALTER ROLE sluice_reader IN DATABASE %I SET default_transaction_read_only = on',
        current_database());
    EXECUTE format(
        'ALTER ROLE sluice_reader IN DATABASE %I SET statement_timeout = ''30s''',
        current_database());
EXCEPTION
    WHEN insufficient_privilege OR undefined_object THEN
        RAISE WARNING 'sluice_reader has no read-only default and no statement timeout here';
END $$;

COMMIT;

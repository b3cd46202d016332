-- Late trades are named by the flusher, and refresh_candles() takes the markets to look at.

CREATE TABLE late_ranges (
    late_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    from_time timestamptz NOT NULL,
    to_time timestamptz NOT NULL,
    market_ids integer [] NOT NULL,
    CHECK (from_time <= to_time)
);

-- schema.sql makes the one with three arguments, and two of them would be ambiguous.
DROP PROCEDURE refresh_candles (timestamptz, timestamptz);

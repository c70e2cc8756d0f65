BEGIN TRANSACTION;
CREATE TABLE calibration (
        scorer_version INTEGER NOT NULL REFERENCES scorer,
        asset          TEXT NOT NULL,
        horizon_s      INTEGER NOT NULL,
        step_s         INTEGER NOT NULL,
        model_no       INTEGER NOT NULL REFERENCES model,
        hour_s         INTEGER NOT NULL,
        times          INTEGER NOT NULL,
        until_s        INTEGER NOT NULL,
        segments       INTEGER NOT NULL,
        pit            REAL NOT NULL CHECK (pit >= 0 AND pit < 9e999),
        spread         REAL CHECK (spread >= 0 AND spread < 9e999),
        bins           BLOB NOT NULL CHECK (length(bins) = 160),
        PRIMARY KEY (scorer_version, asset, horizon_s, step_s, model_no, hour_s)
    ) STRICT, WITHOUT ROWID;
INSERT INTO "calibration" VALUES(1,'BTC',60,10,1,1700002800,8,1700002880,12,5.5,3.25,X'333333333333E33F333333333333E33F333333333333E33F333333333333E33F333333333333E33F333333333333E33F333333333333E33F333333333333E33F333333333333E33F333333333333E33F333333333333E33F333333333333E33F333333333333E33F333333333333E33F333333333333E33F333333333333E33F333333333333E33F333333333333E33F333333333333E33F333333333333E33F');
INSERT INTO "calibration" VALUES(1,'BTC',60,10,2,1700002800,8,1700002880,6,5.5,NULL,X'333333333333F33F333333333333F33F333333333333F33F333333333333F33F333333333333F33F333333333333F33F333333333333F33F333333333333F33F333333333333F33F333333333333F33F333333333333F33F333333333333F33F333333333333F33F333333333333F33F333333333333F33F333333333333F33F333333333333F33F333333333333F33F333333333333F33F333333333333F33F');
CREATE TABLE deployment (
        model_no      INTEGER NOT NULL REFERENCES model,
        deployment_id TEXT NOT NULL,
        code_hash     TEXT,
        first_seen_at_s INTEGER NOT NULL,
        PRIMARY KEY (model_no, deployment_id)
    ) STRICT, WITHOUT ROWID;
INSERT INTO "deployment" VALUES(1,'deployment-1','hash',1700001800);
INSERT INTO "deployment" VALUES(2,'deployment-2',NULL,1700001800);
CREATE TABLE leaderboard (
        created_at_s   INTEGER NOT NULL,
        model_no       INTEGER NOT NULL REFERENCES model,
        scorer_version INTEGER NOT NULL REFERENCES scorer,
        rank           INTEGER,
        score_recent   REAL,
        score_steady   REAL,
        score_anchor   REAL,
        PRIMARY KEY (model_no, created_at_s)
    ) STRICT, WITHOUT ROWID;
INSERT INTO "leaderboard" VALUES(1700002900,1,1,1,0.3,0.2,NULL);
INSERT INTO "leaderboard" VALUES(1700002900,2,1,2,0.3,0.2,NULL);
CREATE TABLE left_out (
        round_no       INTEGER NOT NULL REFERENCES round,
        scorer_version INTEGER NOT NULL REFERENCES scorer,
        reason         TEXT NOT NULL,
        PRIMARY KEY (round_no, scorer_version)
    ) STRICT, WITHOUT ROWID;
INSERT INTO "left_out" VALUES(2,2,'its answers are not stored any more');
CREATE TABLE meta (
        key   TEXT PRIMARY KEY,
        value TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
INSERT INTO "meta" VALUES('clock_s','1700003000.5');
CREATE TABLE model (
        model_no         INTEGER PRIMARY KEY,
        model_id         TEXT NOT NULL UNIQUE,
        model_name       TEXT NOT NULL,
        cruncher_id      TEXT NOT NULL,
        cruncher_name    TEXT NOT NULL,
        deployment_id    TEXT NOT NULL,
        code_hash        TEXT,
        benchmark        INTEGER NOT NULL CHECK (benchmark IN (0, 1)),
        joined_at_s      INTEGER NOT NULL,
        last_seen_at_s   INTEGER NOT NULL,
        first_round_at_s INTEGER
    ) STRICT;
INSERT INTO "model" VALUES(1,'model-1','Modèle 1','cruncher-1','Ada','deployment-1','hash',0,1700001800,1700002920,1700002800);
INSERT INTO "model" VALUES(2,'model-2','Modèle 2','cruncher-2','Göran','deployment-2',NULL,1,1700001800,1700002920,1700002800);
CREATE TABLE pause (
        model_id TEXT PRIMARY KEY,
        since_s  INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
INSERT INTO "pause" VALUES('model-2',1700002930);
CREATE TABLE payload (
        payload_no INTEGER PRIMARY KEY,
        round_no   INTEGER NOT NULL REFERENCES round,
        model_no   INTEGER NOT NULL REFERENCES model,
        body       BLOB NOT NULL,
        UNIQUE (round_no, model_no)
    ) STRICT;
INSERT INTO "payload" VALUES(1,1,1,X'011C020028B52FFD6034019C00002002015B5D0400B85CA890C707B1B8D00D7658910000313031323031333031343031353031363031');
INSERT INTO "payload" VALUES(2,1,2,X'011C020028B52FFD6034019C00002002015B5D0400B85CA890C707B1B8D00D7658910000313032323032333032343032353032363032');
INSERT INTO "payload" VALUES(3,2,1,X'011C020028B52FFD6034019C00002002015B5D0400B85CA890C707B1B8D00D7658910000313031323031333031343031353031363031');
INSERT INTO "payload" VALUES(4,2,2,X'0110020028B52FFD602801DC00006002015B2D312E307D7D2C205D0400AE5A28CE238E585CE8063B2C910000313031323031333031343031353031363031');
INSERT INTO "payload" VALUES(5,3,1,X'011C020028B52FFD6034019C00002002015B5D0400B85CA890C707B1B8D00D7658910000313031323031333031343031353031363031');
INSERT INTO "payload" VALUES(6,3,2,X'011C020028B52FFD6034019C00002002015B5D0400B85CA890C707B1B8D00D7658910000313032323032333032343032353032363032');
INSERT INTO "payload" VALUES(7,5,1,X'011C020028B52FFD6034019C00002002015B5D0400B85CA890C707B1B8D00D7658910000313031323031333031343031353031363031');
INSERT INTO "payload" VALUES(8,5,2,X'011C020028B52FFD6034019C00002002015B5D0400B85CA890C707B1B8D00D7658910000313032323032333032343032353032363032');
CREATE TABLE prediction (
        round_no       INTEGER NOT NULL REFERENCES round,
        model_no       INTEGER NOT NULL REFERENCES model,
        status         TEXT NOT NULL CHECK (status IN ('SUCCESS', 'FAILED', 'TIMEOUT')),
        detail         TEXT,
        received_at_ms INTEGER NOT NULL,
        exec_time_us   INTEGER NOT NULL,
        PRIMARY KEY (round_no, model_no)
    ) STRICT, WITHOUT ROWID;
INSERT INTO "prediction" VALUES(1,1,'SUCCESS',NULL,1700002800041,1501);
INSERT INTO "prediction" VALUES(1,2,'SUCCESS',NULL,1700002800042,1502);
INSERT INTO "prediction" VALUES(2,1,'SUCCESS',NULL,1700002820041,1501);
INSERT INTO "prediction" VALUES(2,2,'FAILED','invalid: segment 3: scale must be above 0',1700002820042,1502);
INSERT INTO "prediction" VALUES(3,1,'SUCCESS',NULL,1700002840041,1501);
INSERT INTO "prediction" VALUES(3,2,'SUCCESS',NULL,1700002840042,1502);
INSERT INTO "prediction" VALUES(5,1,'SUCCESS',NULL,1700002920041,1501);
INSERT INTO "prediction" VALUES(5,2,'SUCCESS',NULL,1700002920042,1502);
CREATE TABLE price (
        asset          TEXT NOT NULL,
        ts_s           INTEGER NOT NULL,
        price          REAL NOT NULL CHECK (price > 0 AND price < 9e999),
        source         TEXT NOT NULL,
        ingested_at_ms INTEGER NOT NULL,
        PRIMARY KEY (asset, ts_s)
    ) STRICT, WITHOUT ROWID;
INSERT INTO "price" VALUES('BTC',1700002790,60000.0,'coinbase',1700002790321);
INSERT INTO "price" VALUES('BTC',1700002795,60005.05,'coinbase',1700002795321);
INSERT INTO "price" VALUES('BTC',1700002800,60005.46,'coinbase',1700002800321);
INSERT INTO "price" VALUES('BTC',1700002805,60000.85,'coinbase',1700002805321);
INSERT INTO "price" VALUES('BTC',1700002810,59995.46,'coinbase',1700002810321);
INSERT INTO "price" VALUES('BTC',1700002815,59994.25,'coinbase',1700002815321);
INSERT INTO "price" VALUES('BTC',1700002820,59998.32,'coinbase',1700002820321);
INSERT INTO "price" VALUES('BTC',1700002825,60003.94,'coinbase',1700002825321);
INSERT INTO "price" VALUES('BTC',1700002830,60005.94,'coinbase',1700002830321);
INSERT INTO "price" VALUES('BTC',1700002835,60002.47,'coinbase',1700002835321);
INSERT INTO "price" VALUES('BTC',1700002840,59996.74,'coinbase',1700002840321);
INSERT INTO "price" VALUES('BTC',1700002845,59994.0,'coinbase',1700002845321);
INSERT INTO "price" VALUES('BTC',1700002850,59996.78,'coinbase',1700002850321);
INSERT INTO "price" VALUES('BTC',1700002855,60002.52,'coinbase',1700002855321);
INSERT INTO "price" VALUES('BTC',1700002860,60005.94,'coinbase',1700002860321);
INSERT INTO "price" VALUES('BTC',1700002865,60003.9,'coinbase',1700002865321);
INSERT INTO "price" VALUES('BTC',1700002870,59998.27,'coinbase',1700002870321);
INSERT INTO "price" VALUES('BTC',1700002875,59994.23,'coinbase',1700002875321);
INSERT INTO "price" VALUES('BTC',1700002880,59995.49,'coinbase',1700002880321);
INSERT INTO "price" VALUES('BTC',1700002885,60000.9,'coinbase',1700002885321);
INSERT INTO "price" VALUES('BTC',1700002890,60005.48,'coinbase',1700002890321);
INSERT INTO "price" VALUES('BTC',1700002895,60005.02,'coinbase',1700002895321);
INSERT INTO "price" VALUES('BTC',1700002900,59999.95,'coinbase',1700002900321);
INSERT INTO "price" VALUES('BTC',1700002905,59994.92,'coinbase',1700002905321);
INSERT INTO "price" VALUES('BTC',1700002910,59994.57,'coinbase',1700002910321);
INSERT INTO "price" VALUES('BTC',1700002915,59999.21,'coinbase',1700002915321);
INSERT INTO "price" VALUES('BTC',1700002920,60004.58,'coinbase',1700002920321);
INSERT INTO "price" VALUES('BTC',1700002925,60005.74,'coinbase',1700002925321);
INSERT INTO "price" VALUES('BTC',1700002930,60001.63,'coinbase',1700002930321);
INSERT INTO "price" VALUES('BTC',1700002935,59996.02,'coinbase',1700002935321);
INSERT INTO "price" VALUES('BTC',1700002940,59994.07,'coinbase',1700002940321);
CREATE TABLE rescore (
        scorer_version INTEGER PRIMARY KEY REFERENCES scorer,
        since_s        INTEGER NOT NULL,
        from_s         INTEGER NOT NULL,
        started_at_s   INTEGER NOT NULL
    ) STRICT;
INSERT INTO "rescore" VALUES(2,1700002800,1700002800,1700002950);
CREATE TABLE round (
        round_no        INTEGER PRIMARY KEY,
        asset           TEXT NOT NULL,
        horizon_s       INTEGER NOT NULL CHECK (horizon_s > 0),
        step_s          INTEGER NOT NULL CHECK (step_s > 0),
        scheduled_at_s  INTEGER NOT NULL,
        resolvable_at_s INTEGER NOT NULL,
        performed_at_ms INTEGER,
        status          TEXT NOT NULL
                        CHECK (status IN ('open', 'closed', 'scored', 'void', 'missed', 'skipped')),
        reason          TEXT,
        validated       INTEGER NOT NULL DEFAULT 0 CHECK (validated IN (0, 1)),
        answered        INTEGER NOT NULL DEFAULT 0,
        failed          INTEGER NOT NULL DEFAULT 0,
        timed_out       INTEGER NOT NULL DEFAULT 0,
        absent          INTEGER NOT NULL DEFAULT 0,
        absent_models   TEXT NOT NULL DEFAULT '[]',
        has_payloads    INTEGER NOT NULL DEFAULT 0 CHECK (has_payloads IN (0, 1)),
        UNIQUE (asset, horizon_s, step_s, scheduled_at_s)
    ) STRICT;
INSERT INTO "round" VALUES(1,'BTC',60,10,1700002800,1700002860,1700002800003,'scored',NULL,1,2,0,0,0,'[]',1);
INSERT INTO "round" VALUES(2,'BTC',60,10,1700002820,1700002880,1700002820003,'scored',NULL,1,1,1,0,0,'[]',1);
INSERT INTO "round" VALUES(3,'BTC',60,10,1700002840,1700002900,1700002840003,'void','no price came',1,2,0,0,0,'[]',1);
INSERT INTO "round" VALUES(4,'BTC',60,10,1700002860,1700002920,NULL,'missed','not running',0,0,0,0,0,'[]',0);
INSERT INTO "round" VALUES(5,'BTC',60,10,1700002920,1700002980,1700002920003,'closed',NULL,0,2,0,0,0,'[]',1);
CREATE TABLE round_score (
        round_no       INTEGER NOT NULL REFERENCES round,
        scorer_version INTEGER NOT NULL REFERENCES scorer,
        median         REAL NOT NULL,
        no_move        REAL NOT NULL,
        resolved       INTEGER NOT NULL,
        scored_at_ms   INTEGER NOT NULL, carried_from INTEGER,
        PRIMARY KEY (round_no, scorer_version)
    ) STRICT, WITHOUT ROWID;
INSERT INTO "round_score" VALUES(1,1,0.75,1.25,6,1700002880000,NULL);
INSERT INTO "round_score" VALUES(1,2,0.5,1.0,6,1700002960000,1);
INSERT INTO "round_score" VALUES(2,1,0.75,1.25,6,1700002880000,NULL);
CREATE TABLE score (
        round_no       INTEGER NOT NULL,
        scorer_version INTEGER NOT NULL,
        model_no       INTEGER NOT NULL REFERENCES model,
        raw            REAL CHECK (raw > -9e999 AND raw < 9e999),
        counted        REAL NOT NULL CHECK (counted > -9e999 AND counted < 9e999),
        score          REAL NOT NULL CHECK (score > -9e999 AND score < 9e999), detail TEXT,
        PRIMARY KEY (round_no, scorer_version, model_no),
        FOREIGN KEY (round_no, scorer_version) REFERENCES round_score
    ) STRICT, WITHOUT ROWID;
INSERT INTO "score" VALUES(1,1,1,0.5,0.5,0.1,NULL);
INSERT INTO "score" VALUES(1,1,2,1.0,1.0,0.2,NULL);
INSERT INTO "score" VALUES(1,2,1,NULL,1.0,0.0,'invalid: a point mass');
INSERT INTO "score" VALUES(2,1,1,0.5,0.5,0.1,NULL);
INSERT INTO "score" VALUES(2,1,2,NULL,1.25,0.2,NULL);
CREATE TABLE scorer (
        scorer_version INTEGER PRIMARY KEY,
        rule           TEXT NOT NULL,
        target         TEXT NOT NULL,
        fingerprint    TEXT NOT NULL,
        created_at_s   INTEGER NOT NULL
    , rules TEXT, published INTEGER NOT NULL DEFAULT 1 CHECK (published IN (0, 1))) STRICT;
INSERT INTO "scorer" VALUES(1,'crps','log_return','f00d',1700001800,'{"rule": "crps", "target": "log_return"}',1);
INSERT INTO "scorer" VALUES(2,'log','log_return','cafe',1700002950,NULL,0);
CREATE TABLE snapshot (
        created_at_s   INTEGER NOT NULL,
        model_no       INTEGER NOT NULL REFERENCES model,
        scorer_version INTEGER NOT NULL REFERENCES scorer,
        asset          TEXT NOT NULL,
        horizon_s      INTEGER NOT NULL,
        step_s         INTEGER NOT NULL,
        score_recent   REAL,
        score_steady   REAL,
        score_anchor   REAL,
        PRIMARY KEY (model_no, created_at_s, asset, horizon_s, step_s)
    ) STRICT, WITHOUT ROWID;
INSERT INTO "snapshot" VALUES(1700002900,1,1,'BTC',60,10,0.3,0.2,NULL);
INSERT INTO "snapshot" VALUES(1700002900,2,1,'BTC',60,10,0.3,0.2,NULL);
CREATE INDEX round_by_time ON round (scheduled_at_s);
CREATE INDEX round_by_status ON round (status, resolvable_at_s);
CREATE INDEX round_with_payloads ON round (resolvable_at_s) WHERE has_payloads = 1;
CREATE INDEX prediction_by_model ON prediction (model_no, round_no);
CREATE INDEX leaderboard_by_time ON leaderboard (created_at_s);
CREATE INDEX snapshot_by_time ON snapshot (created_at_s);
CREATE INDEX round_score_carried ON round_score (scorer_version) WHERE carried_from IS NOT NULL;
CREATE INDEX calibration_by_time ON calibration (hour_s);
COMMIT;
PRAGMA application_id = 1131376204;
PRAGMA user_version = 6;

BEGIN TRANSACTION;
CREATE TABLE header (body TEXT NOT NULL);
INSERT INTO "header" VALUES('{"account":"6692ab197c9c855c9c742a44da792460","format":"sfumato-account/1"}');
CREATE TABLE runs (ledger TEXT PRIMARY KEY, run TEXT NOT NULL, plan TEXT NOT NULL, sequence INTEGER NOT NULL, head TEXT NOT NULL, closed INTEGER NOT NULL, block INTEGER NOT NULL, session TEXT NOT NULL);
INSERT INTO "runs" VALUES('1cc2775815c9071871af57be8d96bb40','old','{"adjacency":"add_or_remove","delta":0.0001,"expected_batch_size":100.0,"kind":"dp_sgd","max_grad_norm":1.0,"noise_multiplier":2.0,"population":1000,"population_from_data":false,"records_per_unit":1,"steps":200,"target_epsilon":null,"unit":"record"}',15,'32e0ac8558e5d1c42e0a5544668a34a839b908b6284e459dbd129698d5b787cb',1,0,'e35c4cae4a3ee57e');
CREATE TABLE spent (ledger TEXT NOT NULL, event TEXT NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (ledger, event));
INSERT INTO "spent" VALUES('1cc2775815c9071871af57be8d96bb40','{"count":1,"mechanism":"poisson_gaussian","noise_multiplier":2.0,"sampling_rate":0.1}',7);
COMMIT;

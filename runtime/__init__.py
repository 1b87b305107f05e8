"""The machine: device, ranks, row shards, precision, log. Nothing here knows about faces."""

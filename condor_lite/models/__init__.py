import os

# Before gRPC is loaded: it would write what it notices, and what models' servers say, into the log.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

#!/bin/sh
# Fails where the parent is not ready; what it waits for stands in the answer.
set -eu
systemctl is-active nitro-enclaves-allocator.service keyhold-enclave.service keyhold-parent.service || true
keyhold-parent enclave status || true
curl --silent --show-error --max-time 10 http://127.0.0.1:9464/readyz
curl --silent --output /dev/null --fail --max-time 10 http://127.0.0.1:9464/readyz

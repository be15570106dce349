#!/bin/sh
# The load balancer stops asking first. Then the parent finishes its batches or gives them back, within a
# lease; its unit waits for that, and the one of the enclave ends after it.
set -eu
systemctl stop keyhold-ready.socket keyhold-ready.service
systemctl stop keyhold-parent.service
systemctl stop keyhold-enclave.service
echo drained

#!/bin/sh
# Works while the stack is deployed with keyring=create: before and after that, KMS makes no data key and the
# instance may not write keyrings. The same command again makes what is missing.
set -eu
# shellcheck disable=SC1091 # user data writes it
. /etc/keyhold/host.env
exec keyhold keyring create --enclave "$KEYHOLD_ENCLAVE" --measurements "$KEYHOLD_MEASUREMENTS" --config "$KEYHOLD_CONFIG" \
	--table-prefix "$KEYHOLD_TABLE_PREFIX" --region "$KEYHOLD_REGION" \
	--algorithm '{{ Algorithm }}' --policy '{{ Policy }}' --pool '{{ Pool }}' --keys '{{ Keys }}'

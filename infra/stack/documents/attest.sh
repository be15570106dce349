#!/bin/sh
# What a host says about its own enclave proves nothing to who does not trust the host. So the document itself
# is printed too: verify it elsewhere with keyhold attest --document.
set -eu
# shellcheck disable=SC1091 # user data writes it
. /etc/keyhold/host.env
imds=http://169.254.169.254/latest
token=$(curl --silent --fail --max-time 5 --request PUT --header 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$imds/api/token")
instance=$(curl --silent --fail --max-time 5 --header "X-aws-ec2-metadata-token: $token" "$imds/meta-data/instance-id")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
code=0
keyhold attest --enclave "$KEYHOLD_ENCLAVE" --measurements "$KEYHOLD_MEASUREMENTS" --config "$KEYHOLD_CONFIG" \
	--role-arn "$KEYHOLD_ROLE" --instance-id "$instance" --save "$folder/document" || code=$?
if [ -s "$folder/document" ]; then
	echo 'document in base64:'
	base64 --wrap=0 "$folder/document"
	echo
fi
exit "$code"

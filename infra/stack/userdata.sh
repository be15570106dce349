# Turns a bare Amazon Linux 2023 into a parent of one enclave. What stands above comes from the stack. Everything
# that is fetched is compared with digests that are part of this text; the packages are those of the repositories
# that the machine image is locked to. Any failure ends it, and the instance never becomes ready.
umask 022
install -d -m 0755 /etc/keyhold /etc/nitro_enclaves /opt/keyhold
install -d -m 0750 /var/log/keyhold

dnf install -y --setopt=install_weak_deps=False aws-nitro-enclaves-cli amazon-cloudwatch-agent logrotate unzip

work=/opt/keyhold/release
rm -rf "$work"
aws s3 cp --only-show-errors --region "$KEYHOLD_REGION" "$KEYHOLD_BUNDLE" /opt/keyhold/release.zip
unzip -q /opt/keyhold/release.zip -d "$work"
rm /opt/keyhold/release.zip
(cd "$work" && printf '%s\n' "$KEYHOLD_SUMS" | sha256sum --check --strict --quiet)
# A file without a digest would be one that nobody looked at.
extra=$(cd "$work" && find . -type f ! -path './lambda/*' -printf '%P\n' | sort | comm -13 <(printf '%s\n' "$KEYHOLD_SUMS" | cut -c 67- | sort) -)
if [ -n "$extra" ]; then
	echo "the bundle holds files without a digest: $extra" >&2
	exit 1
fi

# KMS refuses another image anyhow. This only tells earlier.
measured=$(nitro-cli describe-eif --eif-path "$work/keyhold.eif" | sed -n 's/^ *"PCR0": "\([0-9a-f]\{96\}\)".*/\1/p' | head -n 1)
if [ "$measured" != "$KEYHOLD_PCR0" ]; then
	echo "keyhold.eif measures $measured, and $KEYHOLD_PCR0 is wanted" >&2
	exit 1
fi

# deploy/install keeps settings that are there.
cat >/etc/nitro_enclaves/allocator.yaml <<END
---
# Written by the user data of Keyhold's stack.
memory_mib: $KEYHOLD_MEMORY_MIB
cpu_count: $KEYHOLD_CPU_COUNT
END
cat >/etc/keyhold/enclave.env <<END
KEYHOLD_EIF=/usr/lib/keyhold/keyhold.eif
KEYHOLD_MEASUREMENTS=/usr/lib/keyhold/measurements.json
KEYHOLD_ENCLAVE_CID=16
KEYHOLD_MEMORY_MIB=$KEYHOLD_MEMORY_MIB
KEYHOLD_CPU_COUNT=$KEYHOLD_CPU_COUNT
END
cat >/etc/keyhold/parent.env <<END
KEYHOLD_CONFIG=/etc/keyhold/config.json
KEYHOLD_TABLE_PREFIX=$KEYHOLD_TABLE_PREFIX
KEYHOLD_REGION=$KEYHOLD_REGION
KEYHOLD_WORKERS=4
KEYHOLD_LISTEN=127.0.0.1:9464
END
cat >/etc/keyhold/host.env <<END
KEYHOLD_ENCLAVE=vsock:16
KEYHOLD_MEASUREMENTS=/usr/lib/keyhold/measurements.json
KEYHOLD_CONFIG=/etc/keyhold/config.json
KEYHOLD_TABLE_PREFIX=$KEYHOLD_TABLE_PREFIX
KEYHOLD_REGION=$KEYHOLD_REGION
KEYHOLD_ROLE=$KEYHOLD_ROLE
END
"$work/deploy/install" --dist "$work"

install -m 0644 "$work/host/keyhold-ready.socket" "$work/host/keyhold-ready.service" /etc/systemd/system/
for unit in keyhold-parent keyhold-enclave; do
	install -d -m 0755 "/etc/systemd/system/$unit.service.d"
	sed "s/@UNIT@/$unit/" "$work/host/log.conf" >"/etc/systemd/system/$unit.service.d/log.conf"
done
install -m 0644 "$work/host/logrotate.conf" /etc/logrotate.d/keyhold
install -d -m 0755 /opt/aws/amazon-cloudwatch-agent/etc
for file in agent.json prometheus.yaml; do
	sed -e "s|@STACK@|$KEYHOLD_STACK|g" -e "s|@LOGS@|$KEYHOLD_LOGS|g" -e "s|@REGION@|$KEYHOLD_REGION|g" "$work/host/$file" \
		>"/opt/aws/amazon-cloudwatch-agent/etc/keyhold-$file"
done
systemctl daemon-reload
/opt/aws/amazon-cloudwatch-agent/bin/amazon-cloudwatch-agent-ctl -a fetch-config -m ec2 -s \
	-c file:/opt/aws/amazon-cloudwatch-agent/etc/keyhold-agent.json

if [ ! -f "$work/config.json" ]; then
	echo 'there is no config yet: nothing is started' >&2
	exit 0
fi
install -m 0644 "$work/config.json" /etc/keyhold/config.json
keyhold-parent doctor || echo 'doctor found what stands above' >&2
systemctl enable --now nitro-enclaves-allocator.service keyhold-enclave.service keyhold-parent.service keyhold-ready.socket

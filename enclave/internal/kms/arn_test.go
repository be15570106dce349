package kms_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/keyhold/keyhold/enclave/internal/kms"
)

func TestHostsComeFromTheARN(t *testing.T) {
	const id = ":111122223333:key/01234567-89ab-4def-8123-456789abcdef"
	tests := map[string]string{
		"arn:aws:kms:eu-central-1" + id:         "kms.eu-central-1.amazonaws.com",
		"arn:aws:kms:ap-southeast-2" + id:       "kms.ap-southeast-2.amazonaws.com",
		"arn:aws-cn:kms:cn-north-1" + id:        "kms.cn-north-1.amazonaws.com.cn",
		"arn:aws-us-gov:kms:us-gov-west-1" + id: "kms.us-gov-west-1.amazonaws.com",
	}
	for text, host := range tests {
		arn, err := kms.ParseKeyARN(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if arn.Host() != host || arn.String() != text {
			t.Errorf("%s: host %s, written as %s", text, arn.Host(), arn)
		}
	}
}

func TestEverythingButTheARNOfAKeyIsRefused(t *testing.T) {
	const id = "01234567-89ab-4def-8123-456789abcdef"
	for _, text := range []string{
		"",
		id,
		"alias/keyhold",
		"arn:aws:kms:eu-central-1:111122223333:alias/keyhold",
		"arn:aws:kms:eu-central-1:111122223333:key/mrk-0123456789abcdef0123456789abcdef",
		"arn:aws:kms:eu-central-1:111122223333:key/" + id + "/x",
		"arn:aws:kms:eu-central-1:111122223333:key/" + id + "\n",
		"arn:aws:kms:eu-central-1:111122223333:key/01234567-89AB-4DEF-8123-456789ABCDEF",
		"arn:aws:kms:eu-central-1:111122223333:" + id,
		"arn:aws:kms:eu-central-1:11112222333:key/" + id,
		"arn:aws:kms:eu-central-1::key/" + id,
		"arn:aws:kms::111122223333:key/" + id,
		"arn:aws:kms:eu-central-1.evil.example/:111122223333:key/" + id,
		"arn:aws:kms:eu-central-1@evil-1:111122223333:key/" + id,
		"arn:aws:kms:EU-CENTRAL-1:111122223333:key/" + id,
		"arn:aws:s3:eu-central-1:111122223333:key/" + id,
		"arn:aws-cn:kms:eu-central-1:111122223333:key/" + id,
		"arn:aws:kms:cn-north-1:111122223333:key/" + id,
		"arn:aws:kms:us-gov-west-1:111122223333:key/" + id,
		"arn:aws:kms:us-iso-east-1:111122223333:key/" + id,
		"arn:aws-iso:kms:us-iso-east-1:111122223333:key/" + id,
		"ARN:aws:kms:eu-central-1:111122223333:key/" + id,
		" arn:aws:kms:eu-central-1:111122223333:key/" + id,
	} {
		if arn, err := kms.ParseKeyARN(text); !errors.Is(err, kms.ErrARN) {
			t.Errorf("%q: %v, %v", text, arn, err)
		}
	}
}

func FuzzParseKeyARN(f *testing.F) {
	for _, seed := range []string{
		"arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab", "arn:aws-cn:kms:cn-north-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
		"arn:aws:kms:eu-central-1:111122223333:alias/main", "arn:aws:kms:eu.evil:111122223333:key/x", "",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		arn, err := kms.ParseKeyARN(text)
		if err != nil {
			return
		}
		if arn.String() != text {
			t.Errorf("%q became %q", text, arn)
		}
		if host := arn.Host(); !strings.HasPrefix(host, "kms."+arn.Region+".amazonaws.com") || strings.ContainsAny(host, "/@:?# ") {
			t.Errorf("%q leads to the host %q", text, host)
		}
	})
}

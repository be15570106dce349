package kms

import (
	"errors"
	"regexp"
	"strings"
)

// ErrARN is returned for whatever is not the full ARN of one single-Region key.
var ErrARN = errors.New("kms: want the ARN of a key, arn:<partition>:kms:<region>:<account>:key/<uuid>; aliases, multi-Region keys and bare ids are refused")

// KeyARN names one KMS key.
type KeyARN struct {
	Partition, Region, Account, ID string
}

// dnsSuffixes are those of the partitions whose KMS answers with a certificate
// of the Amazon roots. The isolated partitions have others.
var dnsSuffixes = map[string]string{
	"aws":        "amazonaws.com",
	"aws-us-gov": "amazonaws.com",
	"aws-cn":     "amazonaws.com.cn",
}

var (
	regionForm  = regexp.MustCompile(`^[a-z]{2}(-[a-z]{2,12}){1,2}-[0-9]{1,2}$`)
	accountForm = regexp.MustCompile(`^[0-9]{12}$`)
	keyForm     = regexp.MustCompile(`^key/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
)

// ParseKeyARN refuses everything from which a host name other than that of KMS
// could be derived, and everything that KMS would resolve to another name.
func ParseKeyARN(text string) (KeyARN, error) {
	fields := strings.Split(text, ":")
	if len(fields) != 6 || fields[0] != "arn" || fields[2] != "kms" {
		return KeyARN{}, ErrARN
	}
	arn := KeyARN{Partition: fields[1], Region: fields[3], Account: fields[4], ID: strings.TrimPrefix(fields[5], "key/")}
	known := dnsSuffixes[arn.Partition] != "" && partitionOf(arn.Region) == arn.Partition
	if !known || !regionForm.MatchString(arn.Region) || !accountForm.MatchString(arn.Account) || !keyForm.MatchString(fields[5]) {
		return KeyARN{}, ErrARN
	}
	return arn, nil
}

func partitionOf(region string) string {
	switch {
	case strings.HasPrefix(region, "cn-"):
		return "aws-cn"
	case strings.HasPrefix(region, "us-gov-"):
		return "aws-us-gov"
	case strings.HasPrefix(region, "us-iso"), strings.HasPrefix(region, "eu-iso"), strings.HasPrefix(region, "eusc-"):
		return "" // isolated and sovereign partitions
	default:
		return "aws"
	}
}

// String is the ARN as KMS writes it.
func (a KeyARN) String() string {
	return "arn:" + a.Partition + ":kms:" + a.Region + ":" + a.Account + ":key/" + a.ID
}

// Host is the name that the certificate of the key's KMS must carry.
func (a KeyARN) Host() string { return "kms." + a.Region + "." + dnsSuffixes[a.Partition] }

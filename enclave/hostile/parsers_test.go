package hostile_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// parser is a function that reads bytes of somebody else, and the fuzz target
// that reads more of them.
type parser struct {
	reads  string // what
	source string // file, from the module's root
	code   string // the function, as it stands there
	target string // package folder and fuzz target
}

// parsers is kept by hand. TestEveryParserHasAFuzzTarget finds what it lacks by
// name, so a parser of another name has to be thought of.
var parsers = []parser{
	{"canonical CBOR", "internal/canonical/canonical.go", "func Decode(", "internal/canonical FuzzDecode"},
	{"frames", "internal/wire/wire.go", "func ReadFrame(", "internal/wire FuzzReadFrame"},
	{"messages", "internal/wire/wire.go", "func Decode(", "internal/wire FuzzDecodeTakesOnlyWhatEncodeGives"},
	{"the body of each message", "internal/wire/wire.go", "func DecodeBody(", "internal/wire FuzzDecodeBodyTakesOnlyWhatEncodeGives"},
	{"a parent's connection", "enclave/internal/serve/session.go", "func (c *session) read(", "enclave/internal/serve FuzzConnection"},
	{"an enclave's answers", "parent/signclient/signclient.go", "func Connect(", "parent/signclient FuzzReply"},
	{"the config", "internal/config/config.go", "func Parse(", "internal/config FuzzParseTakesOnlyTheCanonicalForm"},
	{"a config to be put in form", "internal/config/config.go", "func Format(", "internal/config FuzzFormatGivesWhatParseTakes"},
	{"keyring headers", "internal/sealed/sealed.go", "func DecodeHeader(", "internal/sealed FuzzDecodeHeaderTakesOnlyWhatEncodeGives"},
	{"sealed entries", "internal/sealed/sealed.go", "func DecodeEntry(", "internal/sealed FuzzDecodeEntryTakesOnlyWhatEncodeGives"},
	{"what is inside of sealed entries", "enclave/internal/keyring/seal.go", "func (s *ring) unseal(", "enclave/internal/keyring FuzzOpenAcceptsOnlyWhatWasSealed"},
	{"statements, receipts, heads and their envelope", "internal/receipt/receipt.go", "func Decode[", "internal/receipt FuzzDecodeTakesOnlyWhatEncodeGives"},
	{"signed receipts", "internal/receipt/receipt.go", "func OpenReceipt(", "internal/receipt FuzzOpenReceiptTakesOnlyTheSigned"},
	{"signed heads", "internal/receipt/receipt.go", "func OpenHeads(", "internal/receipt FuzzOpenHeadsTakesOnlyTheSigned"},
	{"boot statements", "internal/receipt/receipt.go", "func CheckStatement(", "internal/receipt FuzzCheckStatementTakesOnlyTheVouchedFor"},
	{"payload segments", "internal/record/segment.go", "func DecodePayload(", "internal/record FuzzDecodePayloadTakesOnlyWhatEncodeGives"},
	{"result segments", "internal/record/segment.go", "func DecodeResult(", "internal/record FuzzDecodeResultTakesOnlyWhatEncodeGives"},
	{"batch ids", "internal/record/record.go", "func (id BatchID) Split(", "internal/record FuzzBatchIDSplitTakesOnlyWhatWasMade"},
	{"signatures", "internal/payload/verify.go", "func Verify(", "internal/payload FuzzVerifyAcceptsOnlyTheOneSignature"},
	{"attestation documents", "attestation/parse.go", "func Parse(", "attestation FuzzParse"},
	{"the payload of attestation documents", "attestation/parse.go", "func parsePayload(", "attestation FuzzParsePayload"},
	{"attestation documents to be verified", "attestation/verify.go", "func VerifyRecorded(", "attestation FuzzVerifyRecorded"},
	{"the time of attestation documents", "attestation/nsm/timestamp.go", "func Timestamp(", "attestation/nsm FuzzTimestamp"},
	{"CMS envelopes", "enclave/internal/kms/envelope.go", "func OpenEnvelope(", "enclave/internal/kms FuzzOpen"},
	{"key ARNs", "enclave/internal/kms/arn.go", "func ParseKeyARN(", "enclave/internal/kms FuzzParseKeyARN"},
	{"credentials", "enclave/credentials.go", "func askCredentials(", "enclave FuzzCredentials"},
	{"import lines", "parent/intake/line.go", "func ParseLine(", "parent/intake FuzzParseLine"},
	{"the server name of a TLS hello", "parent/egress/egress.go", "func (f Forwarder) serve(", "parent/egress FuzzHello"},
	{"nitro-cli's list of enclaves", "parent/watch/cli.go", "func parseEnclaves(", "parent/watch FuzzParseEnclaves"},
	{"the enclave allocator's settings", "parent/doctor/files.go", "func parseAllocator(", "parent/doctor FuzzParseAllocator"},
	{"key policies", "keypolicy/parse.go", "func Parse(", "keypolicy FuzzParse"},
	{"enclave images", "internal/eif/parse.go", "func Parse(", "internal/eif FuzzParse"},
	{"ramdisks", "internal/eif/cpio/cpio.go", "func Read(", "internal/eif/cpio FuzzRead"},
	{"measurements of an image", "internal/eif/measurements.go", "func ParseMeasurements(", "internal/eif FuzzParseMeasurements"},
	{"signatures of an image", "internal/eif/signature.go", "func VerifySignature(", "internal/eif FuzzVerifySignature"},
	{"key policies of the local KMS", "internal/awslocal/kms/policy.go", "func parsePolicy(", "internal/awslocal/kms FuzzPolicy"},
}

// unfuzzed are functions that are named like parsers and read no bytes of others,
// or a closed set of words.
var unfuzzed = map[string]string{
	"internal/record/names.go func ParseKind(":          "a word of a list",
	"internal/record/names.go func ParseAlgorithm(":     "a word of a list",
	"internal/record/record.go func ParseKeyID(":        "64 hex digits",
	"internal/record/record.go func ParseBootID(":       "64 hex digits",
	"internal/eif/signature.go func ParseCertificate(":  "a PEM file, by crypto/x509",
	"internal/image/load.go func ReadFile(":             "a file of the operator, with a bound",
	"internal/image/load.go func ReadKernel(":           "files of the operator, which the image's builder checks",
	"internal/image/load.go func ReadBlobs(":            "files of the operator, which the image's builder checks",
	"keypolicy/parse.go func ParseOutput(":              "one field around what Parse reads",
	"keypolicy/pcr.go func ParsePCR(":                   "96 hex digits",
	"parent/watch/image.go func ReadMeasurements(":      "by internal/eif",
	"attestation/nsmtest/ca.go func ParseCA(":           "a file of local mode",
	"internal/e2e/history.go func ReadHistory(":         "what a test has printed",
	"attestation/nsm/device.go func Open(":              "a device",
	"enclave/internal/keyring/secp/secp.go func Parse(": "a public key that the ring has derived",
}

var named = regexp.MustCompile(`(?m)^func (?:Parse|Decode|Open|Read)(?:[A-Z][A-Za-z]*)?[\[(]`)

func moduleFile(path string) string { return filepath.Join("..", "..", filepath.FromSlash(path)) }

// targets are all fuzz targets, by folder and name.
func targets(t *testing.T) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	fuzz := regexp.MustCompile(`(?m)^func (Fuzz[A-Za-z0-9]+)\(f \*testing\.F\) \{`)
	each(t, func(path string) bool { return strings.HasSuffix(path, "_test.go") }, func(path, text string) {
		for _, m := range fuzz.FindAllStringSubmatch(text, -1) {
			if strings.Contains(text, "f.Add(") {
				found[filepath.ToSlash(filepath.Dir(path))+" "+m[1]] = true
			}
		}
	})
	return found
}

// each reads the Go files of the module that want says.
func each(t *testing.T, want func(string) bool, f func(path, text string)) {
	t.Helper()
	root := os.DirFS(moduleFile("."))
	must(t, fs.WalkDir(root, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "node_modules" || d.Name() == "testdata") {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || !want(path) {
			return nil
		}
		text, err := fs.ReadFile(root, path)
		f(path, string(text))
		return err
	}))
}

func TestEveryParserHasAFuzzTarget(t *testing.T) {
	have := targets(t)
	listed := map[string]bool{}
	for _, p := range parsers {
		listed[p.source+" "+p.code] = true
		text, err := os.ReadFile(moduleFile(p.source))
		must(t, err)
		if !strings.Contains(string(text), p.code) {
			t.Errorf("%s: there is no %q in %s any more", p.reads, p.code, p.source)
		}
		if !have[p.target] {
			t.Errorf("%s: there is no fuzz target with a seed corpus %q", p.reads, p.target)
		}
	}
	for at := range unfuzzed {
		path, f, _ := strings.Cut(at, " ")
		text, err := os.ReadFile(moduleFile(path))
		must(t, err)
		if !strings.Contains(string(text), f) {
			t.Errorf("there is no %q in %s any more", f, path)
		}
	}
	untested := func(path string) bool {
		return !strings.HasSuffix(path, "_test.go") && !strings.HasPrefix(path, "cmd/") && !strings.HasPrefix(path, "internal/bench/") && !strings.HasPrefix(path, "internal/checker/") &&
			!strings.HasPrefix(path, "infra/") // another module, which reads its operator's own files
	}
	each(t, untested, func(path, text string) {
		for _, f := range named.FindAllString(text, -1) {
			if at := path + " " + f; !listed[at] && unfuzzed[at] == "" {
				t.Errorf("%s: it is named like a parser, but is in neither list", at)
			}
		}
	})
	t.Logf("%d parsers", len(parsers))
}

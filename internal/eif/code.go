package eif

// Code is a stable name of what is wrong with an image and an error with a fixed
// text: errors.Is(err, eif.BadCRC) works through any wrapping.
type Code string

// What is wrong with a file.
const (
	Short          Code = "eif_short"
	BadMagic       Code = "eif_magic"
	BadVersion     Code = "eif_version"
	BadFlags       Code = "eif_flags"
	BadReserved    Code = "eif_reserved"
	BadMemory      Code = "eif_memory"
	BadCPUs        Code = "eif_cpus"
	BadCount       Code = "eif_section_count"
	BadTable       Code = "eif_section_table"
	BeyondEnd      Code = "eif_section_beyond_end"
	Overlap        Code = "eif_section_overlap"
	Gap            Code = "eif_section_gap"
	Empty          Code = "eif_section_empty"
	Trailing       Code = "eif_trailing_bytes"
	BadCRC         Code = "eif_crc"
	SizeDiffers    Code = "eif_section_size"
	BadType        Code = "eif_section_type"
	BadSectionFlag Code = "eif_section_flags"
	Order          Code = "eif_section_order"
	TwoKernels     Code = "eif_two_kernels"
	TwoCmdlines    Code = "eif_two_cmdlines"
	TwoMetadata    Code = "eif_two_metadata"
	TwoSignatures  Code = "eif_two_signatures"
	NoKernel       Code = "eif_no_kernel"
	NoCmdline      Code = "eif_no_cmdline"
	NoMetadata     Code = "eif_no_metadata"
	NoRamdisk      Code = "eif_no_ramdisk"
	BadCmdline     Code = "eif_cmdline"
	BadMetadata    Code = "eif_metadata"
	BadSignature   Code = "eif_signature_form"
	BadCertificate Code = "eif_certificate"
	WrongSignature Code = "eif_signature"

	BadMeasurements Code = "eif_measurements" // of a file of measurements
)

//nolint:gochecknoglobals // never written after start
var texts = map[Code]string{
	Short:          "the file is shorter than the header of an EIF: it is cut short or no EIF",
	BadMagic:       "the file does not begin with .eif: it is no EIF",
	BadVersion:     "the EIF is not of version 4",
	BadFlags:       "the header has flags that version 4 does not know",
	BadReserved:    "a reserved field of the header is not zero",
	BadMemory:      "the default memory is zero",
	BadCPUs:        "the number of default CPUs is zero",
	BadCount:       "the number of sections is not between 4 and 32",
	BadTable:       "the header's table has an entry behind the last section",
	BeyondEnd:      "a section lies beyond the end of the file: the file is cut short, or its table is wrong",
	Overlap:        "two sections overlap, or one overlaps the header",
	Gap:            "there are bytes between two sections that no section claims",
	Empty:          "a section has no content",
	Trailing:       "there are bytes behind the last section",
	BadCRC:         "the checksum is wrong: the file was changed or damaged",
	SizeDiffers:    "a section has another size in its own header than in the file's",
	BadType:        "a section is of an unknown type",
	BadSectionFlag: "a section has flags",
	Order:          "the sections are not in the order kernel, command line, metadata, ramdisks, signature",
	TwoKernels:     "there are two kernels",
	TwoCmdlines:    "there are two command lines",
	TwoMetadata:    "there are two metadata sections",
	TwoSignatures:  "there are two signature sections",
	NoKernel:       "there is no kernel",
	NoCmdline:      "there is no command line",
	NoMetadata:     "there is no metadata section",
	NoRamdisk:      "there is no ramdisk",
	BadCmdline:     "the command line has bytes that are not printable ASCII",
	BadMetadata:    "the metadata are not the JSON object that nitro-cli writes",
	BadSignature:   "the signature section is not the CBOR of one certificate and one COSE_Sign1 with ES384",
	BadCertificate: "the signing certificate is not one PEM certificate of a P-384 key and nothing else, as openssl writes it",
	WrongSignature: "the signature does not verify: it was made by another key, or for another image",

	BadMeasurements: "this is not the JSON of measurements that nitro-cli or keyhold image build prints",
}

// Error returns the code and its text.
func (c Code) Error() string { return string(c) + ": " + texts[c] }

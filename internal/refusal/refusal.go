// Package refusal is the one table of the codes with which Keyhold refuses
// something: over the wire, in results, as exit codes and as HTTP status. Codes
// and texts are fixed and hold nothing that came from outside.
package refusal

import (
	"errors"
	"slices"
)

// Code is a stable name of a refusal and an error with a fixed text, so
// errors.Is(err, refusal.FenceStale) works through any wrapping.
type Code string

// Class says what to do about a refusal.
type Class int

// The classes.
const (
	Refuse  Class = iota // the same request will be refused again
	Retry                // nothing happened; trying again may work
	Unknown              // it may have happened: look before trying again
)

// Codes of the wire and of what an enclave refuses.
const (
	BadFrame       Code = "bad_frame"
	BadMessage     Code = "bad_message"
	BadVersion     Code = "bad_version"
	UnknownType    Code = "unknown_type"
	TooLarge       Code = "too_large"
	Busy           Code = "busy"
	Internal       Code = "internal"
	NotConfigured  Code = "not_configured"
	ConfigInvalid  Code = "config_invalid"
	ConfigConflict Code = "config_conflict"
	ConfigMeasure  Code = "config_measure"
	EntropyWeak    Code = "entropy_weak"
	DebugEnclave   Code = "debug_enclave"
	NSMFailed      Code = "nsm_failed"

	KMSDenied      Code = "kms_denied"
	KMSUnreachable Code = "kms_unreachable"
	KMSThrottled   Code = "kms_throttled"
	KMSCredentials Code = "kms_credentials"
	KMSReply       Code = "kms_reply"
	KMSWrongKey    Code = "kms_wrong_key"

	KMSKeyUnfit   Code = "kms_key_unfit"
	PolicyForeign Code = "key_policy_foreign"

	NoKeyring       Code = "no_keyring"
	KeyringConflict Code = "keyring_conflict"
	KeyringInvalid  Code = "keyring_invalid"
	EpochClosed     Code = "epoch_closed"
	SealedInvalid   Code = "sealed_invalid"
	CreateDenied    Code = "create_denied"
	CreateLimit     Code = "create_limit"

	KeyUnknown     Code = "key_unknown"
	KeyDenied      Code = "key_denied"
	PolicyDenied   Code = "policy_denied"
	PayloadInvalid Code = "payload_invalid"
	TicketInvalid  Code = "ticket_invalid"
	Deadline       Code = "deadline"
	FenceStale     Code = "fence_stale"
	FenceConflict  Code = "fence_conflict"
	LaneFull       Code = "lane_full"
	VerifyFailed   Code = "verify_failed"
)

// Codes that stand in a result instead of a signature.
const (
	KeyUnavailable Code = "key_unavailable"
	EnclaveCrash   Code = "enclave_crash"
	DigestLength   Code = "digest_length"
)

// Codes of the parent and of the operator's tool.
const (
	UsageWrong       Code = "usage"
	StoreUnreachable Code = "store_unreachable"
	StoreDenied      Code = "store_denied"
	TablesMissing    Code = "tables_missing"
	ImportLine       Code = "import_line"
	ImportConflict   Code = "import_conflict"
	ImportPending    Code = "import_pending"
	ImportAborted    Code = "import_aborted"
	ImportNotFound   Code = "import_not_found"
	RecordConflict   Code = "record_conflict"
	ReceiptInvalid   Code = "receipt_invalid"
	AttestFailed     Code = "attestation_failed"
	PolicyLoose      Code = "key_policy_loose"
	PolicyUnread     Code = "key_policy_unread"
	BatchState       Code = "batch_state"
	SomeRefused      Code = "some_refused"
	DirBusy          Code = "dir_busy"
	DirMismatch      Code = "dir_mismatch"
	PortInUse        Code = "port_in_use"
	DiskFull         Code = "disk_full"
	ServiceMissing   Code = "service_missing"
)

// Codes of the host that runs an enclave.
const (
	ImageMismatch Code = "image_mismatch"
	EnclaveMemory Code = "enclave_memory"
	NitroCLI      Code = "nitro_cli_failed"
	EnclaveState  Code = "enclave_state"
	EnclaveGone   Code = "enclave_gone"
	EnclaveWedged Code = "enclave_wedged"
	HostUnfit     Code = "host_unfit"
)

// Entry is one row of the table.
type Entry struct {
	Code  Code
	Class Class
	Exit  int    // of a command that ends with it: 1 failed, 2 wrong usage, 3 some records refused
	HTTP  int    // status of the parent's endpoints (RFC 9110); numbers, so that no HTTP is linked into the keyring
	Text  string // fixed; says what happened and, where it helps, what to do
}

//nolint:gochecknoglobals // the one table; never written after start
var table = []Entry{
	{BadFrame, Refuse, 1, 400, "the frame is empty, longer than 1 MiB or cut off"},
	{BadMessage, Refuse, 1, 400, "the message is not the canonical CBOR of its type"},
	{BadVersion, Refuse, 1, 400, "the message is of another protocol version: bring parent and enclave to the same release"},
	{UnknownType, Refuse, 1, 400, "the message type is unknown"},
	{TooLarge, Refuse, 1, 413, "the request asks for more than one message may hold"},
	{Busy, Retry, 1, 503, "too many connections or requests: try again later"},
	{Internal, Unknown, 1, 500, "the request failed inside; the enclave goes on"},
	{NotConfigured, Retry, 1, 503, "the enclave has no config yet: send configure first"},
	{ConfigInvalid, Refuse, 1, 400, "the config is not valid: check it with keyhold config validate; the enclave must be restarted"},
	{ConfigConflict, Refuse, 1, 409, "the enclave was configured with another config: restart it to change the config"},
	{ConfigMeasure, Refuse, 1, 500, "PCR16 was not zero and unlocked, or did not take the config's measurement: restart the enclave"},
	{EntropyWeak, Refuse, 1, 500, "the kernel's random generator is not fed by the NSM"},
	{DebugEnclave, Refuse, 1, 403, "a debug enclave gets no keys: run it without debug mode"},
	{NSMFailed, Retry, 1, 503, "the Nitro security module did not answer as it should"},
	{KMSDenied, Refuse, 1, 403, "KMS denied the request: compare PCR0 and PCR16 with the key policy"},
	{KMSUnreachable, Retry, 1, 503, "KMS could not be reached through the parent, or TLS failed"},
	{KMSThrottled, Retry, 1, 503, "KMS throttled the request: try again later"},
	{KMSCredentials, Retry, 1, 503, "the parent gave no valid AWS credentials, or they have expired"},
	{KMSReply, Refuse, 1, 502, "the answer of KMS is not what was asked for"},
	{KMSWrongKey, Refuse, 1, 403, "the wrapped data key does not belong to the measured KMS key, keyring and epoch"},
	{KMSKeyUnfit, Refuse, 1, 403, "the KMS key has grants, is multi-region, disabled, of another kind, or its material was not made by KMS"},
	{PolicyForeign, Refuse, 1, 403, "the key policy does not admit this image and config"},
	{NoKeyring, Retry, 1, 503, "the enclave has no keyring: create or load one first"},
	{KeyringConflict, Refuse, 1, 409, "the enclave holds another keyring: restart it to load this one"},
	{KeyringInvalid, Refuse, 1, 400, "the keyring header is malformed or not the one of the config"},
	{EpochClosed, Refuse, 1, 403, "the config does not open this epoch"},
	{SealedInvalid, Refuse, 1, 400, "a sealed key is malformed, of another keyring, or its public part does not belong to it"},
	{CreateDenied, Refuse, 1, 403, "the config permits no new key of this algorithm and policy"},
	{CreateLimit, Refuse, 1, 403, "the config permits no more keys of this algorithm and policy"},
	{KeyUnknown, Retry, 1, 404, "the key is not loaded: load its sealed entry"},
	{KeyDenied, Refuse, 1, 403, "the key is on the measured deny list"},
	{PolicyDenied, Refuse, 1, 403, "the key's policy does not permit this kind"},
	{PayloadInvalid, Refuse, 1, 400, "the payload segment is malformed"},
	{TicketInvalid, Retry, 1, 409, "the ticket is of another boot or was changed: fetch a new one"},
	{Deadline, Retry, 1, 409, "the lease ran out before the signatures could be released"},
	{FenceStale, Refuse, 1, 409, "a newer fence of this key is known"},
	{FenceConflict, Refuse, 1, 409, "this fence of this key was used for another batch or payload"},
	{LaneFull, Retry, 1, 409, "receipts of this lane are not acknowledged: store and acknowledge them first"},
	{VerifyFailed, Refuse, 1, 500, "a signature did not verify after signing and was dropped"},
	{KeyUnavailable, Refuse, 3, 409, "the key is disabled or lost"},
	{EnclaveCrash, Refuse, 3, 409, "signing this record took the enclave down"},
	{DigestLength, Refuse, 3, 400, "the digest to sign does not have 32 bytes"},
	{UsageWrong, Refuse, 2, 400, "wrong usage"},
	{StoreUnreachable, Retry, 1, 503, "DynamoDB could not be reached or did not answer"},
	{StoreDenied, Refuse, 1, 403, "DynamoDB denied the request: check the credentials, their expiry and their permissions on the tables"},
	{TablesMissing, Refuse, 1, 503, "the tables are not there: run keyhold tables create"},
	{ImportLine, Refuse, 1, 400, "a line of the input is not a record"},
	{ImportConflict, Refuse, 1, 409, "an import of this id exists with other values"},
	{ImportPending, Retry, 1, 409, "a record of the input belongs to an import that never finished: run that import again or abort it"},
	{ImportAborted, Refuse, 1, 409, "the import was aborted: give the new one another --import-id"},
	{ImportNotFound, Refuse, 1, 404, "there is no such import"},
	{RecordConflict, Refuse, 1, 409, "a record of this id exists with another payload"},
	{ReceiptInvalid, Refuse, 1, 409, "a receipt, boot statement or result does not verify"},
	{AttestFailed, Refuse, 1, 403, "the enclave did not attest to be what is wanted"},
	{PolicyLoose, Refuse, 1, 403, "the KMS key policy lets out more than it should, or less: run keyhold policy prove on it"},
	{PolicyUnread, Refuse, 1, 403, "the KMS key policy is malformed, or has parts whose effect would have to be guessed"},
	{BatchState, Refuse, 1, 409, "the batch is not in a state that permits this"},
	{SomeRefused, Refuse, 3, 200, "some records were refused; their reasons are in the export"},
	{DirBusy, Retry, 1, 409, "another run holds this folder: wait for it or stop it"},
	{DirMismatch, Refuse, 2, 409, "the folder belongs to a run with other values: use the same values or another folder"},
	{PortInUse, Retry, 1, 409, "the port is in use: stop what uses it or choose another"},
	{DiskFull, Retry, 1, 507, "the disk is full: free some space and run the same command again"},
	{ServiceMissing, Refuse, 1, 503, "a program that this needs is not installed: run make tools"},
	{ImageMismatch, Refuse, 1, 403, "the image file is not the one of the measurements: deploy both from one build"},
	{EnclaveMemory, Refuse, 1, 507, "an enclave needs four times the size of its image file: raise memory_mib here and in allocator.yaml"},
	{NitroCLI, Retry, 1, 503, "nitro-cli failed: run keyhold-parent doctor"},
	{EnclaveState, Refuse, 1, 409, "the enclave does not run as it was started, or its context id belongs to another one"},
	{EnclaveGone, Retry, 1, 503, "the enclave ended by itself"},
	{EnclaveWedged, Retry, 1, 503, "the enclave runs but does not answer"},
	{HostUnfit, Refuse, 1, 503, "the host lacks something: each check that failed says what to do next"},
}

// Error returns the code and its text.
func (c Code) Error() string {
	if e, ok := Lookup(c); ok {
		return string(c) + ": " + e.Text
	}
	return string(c)
}

// Lookup returns the row of c.
func Lookup(c Code) (Entry, bool) {
	i := slices.IndexFunc(table, func(e Entry) bool { return e.Code == c })
	if i < 0 {
		return Entry{}, false
	}
	return table[i], true
}

// Table returns all rows, for docs and tests.
func Table() []Entry { return slices.Clone(table) }

// Of returns the code that err carries, or Internal where it carries none.
func Of(err error) Code {
	var c Code
	if errors.As(err, &c) {
		return c
	}
	return Internal
}

// Exit returns the exit code of a command that ended with err: 0 for nil, 1
// where err carries no code.
func Exit(err error) int {
	if err == nil {
		return 0
	}
	if e, ok := Lookup(Of(err)); ok {
		return e.Exit
	}
	return 1
}

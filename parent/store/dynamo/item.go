package dynamo

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
)

// item is an item, or the placeholders of an expression.
type item map[string]types.AttributeValue

var errMalformed = errors.New("malformed item")

func text(s string) types.AttributeValue { return &types.AttributeValueMemberS{Value: s} }

// bytesValue is b, empty where it is nil: the SDK would write NULL for that.
func bytesValue(b []byte) types.AttributeValue {
	if b == nil {
		b = []byte{}
	}
	return &types.AttributeValueMemberB{Value: b}
}

func number[N ~int | ~int64 | ~uint32 | ~uint64](n N) types.AttributeValue {
	if n < 0 {
		return &types.AttributeValueMemberN{Value: strconv.FormatInt(int64(n), 10)}
	}
	return &types.AttributeValueMemberN{Value: strconv.FormatUint(uint64(n), 10)}
}

func numbers(ns []uint32) types.AttributeValue {
	set := make([]string, len(ns))
	for i, n := range ns {
		set[i] = strconv.FormatUint(uint64(n), 10)
	}
	return &types.AttributeValueMemberNS{Value: set}
}

func (m item) text(name, s string) {
	if s != "" {
		m[name] = text(s)
	}
}

func (m item) binary(name string, b []byte) {
	if len(b) != 0 {
		m[name] = bytesValue(b)
	}
}

// id puts one of the 32-byte names and hashes; zero is none.
func (m item) id(name string, id [32]byte) {
	if id != [32]byte{} {
		m[name] = bytesValue(id[:])
	}
}

func (m item) number(name string, n uint64) {
	if n != 0 {
		m[name] = number(n)
	}
}

func (m item) int(name string, n int) {
	if n != 0 {
		m[name] = number(n)
	}
}

func (m item) time(name string, t time.Time) {
	if !t.IsZero() {
		m[name] = number(t.UnixNano())
	}
}

// reader takes attributes out of an item. After the first one of the wrong type
// it has an error and yields zeros; an absent one is zero.
type reader struct {
	m   item
	err error
}

func (r *reader) fail(name string) {
	if r.err == nil {
		r.err = fmt.Errorf("%w: attribute %s", errMalformed, name)
	}
}

func (r *reader) text(name string) string {
	switch v := r.m[name].(type) {
	case nil:
		return ""
	case *types.AttributeValueMemberS:
		return v.Value
	}
	r.fail(name)
	return ""
}

func (r *reader) binary(name string) []byte {
	switch v := r.m[name].(type) {
	case nil:
		return nil
	case *types.AttributeValueMemberB:
		return v.Value
	}
	r.fail(name)
	return nil
}

func (r *reader) id(name string) (id [32]byte) {
	switch b := r.binary(name); len(b) {
	case 0:
	case len(id):
		copy(id[:], b)
	default:
		r.fail(name)
	}
	return id
}

func (r *reader) digits(name string) string {
	switch v := r.m[name].(type) {
	case nil:
		return "0"
	case *types.AttributeValueMemberN:
		return v.Value
	}
	r.fail(name)
	return "0"
}

func (r *reader) number(name string) uint64 {
	n, err := strconv.ParseUint(r.digits(name), 10, 64)
	if err != nil {
		r.fail(name)
	}
	return n
}

func (r *reader) int(name string) int {
	n, err := strconv.Atoi(r.digits(name))
	if err != nil {
		r.fail(name)
	}
	return n
}

func (r *reader) uint32(name string) uint32 {
	n, err := strconv.ParseUint(r.digits(name), 10, 32)
	if err != nil {
		r.fail(name)
	}
	return uint32(n)
}

func (r *reader) time(name string) time.Time {
	if r.m[name] == nil {
		return time.Time{}
	}
	ns, err := strconv.ParseInt(r.digits(name), 10, 64)
	if err != nil {
		r.fail(name)
		return time.Time{}
	}
	return time.Unix(0, ns).UTC()
}

func (r *reader) bool(name string) bool {
	switch v := r.m[name].(type) {
	case nil:
		return false
	case *types.AttributeValueMemberBOOL:
		return v.Value
	}
	r.fail(name)
	return false
}

// numbers reads a set in ascending order.
func (r *reader) numbers(name string) []uint32 {
	var digits []string
	switch v := r.m[name].(type) {
	case nil:
		return nil
	case *types.AttributeValueMemberNS:
		digits = v.Value
	default:
		r.fail(name)
		return nil
	}
	ns := make([]uint32, len(digits))
	for i, d := range digits {
		n, err := strconv.ParseUint(d, 10, 32)
		if err != nil {
			r.fail(name)
		}
		ns[i] = uint32(n)
	}
	slices.Sort(ns)
	return ns
}

func (r *reader) list(name string) []types.AttributeValue {
	switch v := r.m[name].(type) {
	case nil:
		return nil
	case *types.AttributeValueMemberL:
		return v.Value
	}
	r.fail(name)
	return nil
}

package checker

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"
)

// maxAnswer bounds one answer of the database in bytes: a page has 1 MiB of items, in base64 and JSON.
const maxAnswer = 16 << 20

// database speaks just enough of DynamoDB's JSON over HTTP to read. A local one wants a signature to be
// there, and does not look at it.
type database struct {
	endpoint, prefix string
	client           http.Client
}

// item is an item as DynamoDB writes it: attribute, type, value.
type item map[string]map[string]json.RawMessage

func (d *database) call(ctx context.Context, op string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, d.endpoint, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	req.Header.Set("Content-Type", "application/x-amz-json-1.0")
	req.Header.Set("X-Amz-Target", "DynamoDB_20120810."+op)
	req.Header.Set("X-Amz-Date", time.Now().UTC().Format("20060102T150405Z"))
	req.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=checker/"+time.Now().UTC().Format("20060102")+
		"/us-east-1/dynamodb/aws4_request, SignedHeaders=host;x-amz-date;x-amz-target, Signature=00")
	res, err := d.client.Do(req)
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	raw, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err = errors.Join(err, res.Body.Close()); err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: the database answers %d", op, res.StatusCode)
	}
	if err := json.Unmarshal(raw, out); err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	return nil
}

// scan calls f for every item of a table, with the named attributes or with all.
func (d *database) scan(ctx context.Context, table string, names []string, f func(*row) error) error {
	in := map[string]any{"TableName": d.prefix + table, "ConsistentRead": true}
	if len(names) > 0 {
		places, expression := map[string]string{}, ""
		for i, n := range names {
			place := "#" + strconv.Itoa(i)
			places[place] = n
			if i > 0 {
				expression += ","
			}
			expression += place
		}
		in["ExpressionAttributeNames"], in["ProjectionExpression"] = places, expression
	}
	for {
		var page struct {
			Items            []item
			LastEvaluatedKey json.RawMessage
		}
		if err := d.call(ctx, "Scan", in, &page); err != nil {
			return fmt.Errorf("read table %s: %w", table, err)
		}
		for _, it := range page.Items {
			r := &row{item: it}
			if err := errors.Join(f(r), r.err); err != nil {
				return fmt.Errorf("table %s: %w", table, err)
			}
		}
		if len(page.LastEvaluatedKey) <= len("{}") {
			return nil
		}
		in["ExclusiveStartKey"] = page.LastEvaluatedKey
	}
}

// row reads attributes of an item; an absent one is zero. After the first one of another type it has an
// error.
type row struct {
	item item
	err  error
}

func (r *row) value(name, kind string, v any) bool {
	attribute, there := r.item[name]
	if !there {
		return false
	}
	raw, right := attribute[kind]
	if !right || json.Unmarshal(raw, v) != nil {
		r.err = fmt.Errorf("attribute %s is not of type %s", name, kind)
		return false
	}
	return true
}

func (r *row) text(name string) (s string) {
	r.value(name, "S", &s)
	return s
}

func (r *row) bytes(name string) (b []byte) {
	r.value(name, "B", &b) // JSON writes bytes as base64, as DynamoDB does
	return b
}

func (r *row) number(name string) uint64 {
	var digits string
	if !r.value(name, "N", &digits) {
		return 0
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	if err != nil {
		r.err = fmt.Errorf("attribute %s is no number", name)
	}
	return n
}

func (r *row) time(name string) time.Time {
	n := r.number(name)
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, int64(n)).UTC() //nolint:gosec // nanoseconds since 1970, below 2^63 until 2262
}

// attempts reads the list of lists (owner, key fence, end) of a control item.
func (r *row) attempts(name string) (out []attempt) {
	var list []struct {
		L []struct{ S, N string }
	}
	r.value(name, "L", &list)
	for _, a := range list {
		if len(a.L) != 3 {
			r.err = fmt.Errorf("attribute %s has another form", name)
			return nil
		}
		fence, err := strconv.ParseUint(a.L[1].N, 10, 64)
		if err != nil {
			r.err = fmt.Errorf("attribute %s has another form", name)
			return nil
		}
		out = append(out, attempt{owner: a.L[0].S, keyFence: fence, end: a.L[2].S})
	}
	return out
}

func encode64(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

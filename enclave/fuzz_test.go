package enclave_test

import (
	"context"
	"net"
	"strings"
	"testing"

	"github.com/keyhold/keyhold/enclave"
)

// FuzzCredentials lets the parent answer with any bytes in place of HTTP.
func FuzzCredentials(f *testing.F) {
	const good = `{"AccessKeyId":"a","SecretAccessKey":"s","Token":"t"}`
	for _, seed := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 53\r\n\r\n" + good, "HTTP/1.0 200 OK\r\n\r\n" + good, "HTTP/1.1 302 Found\r\nLocation: http://else\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n35\r\n" + good + "\r\n0\r\n\r\n", "HTTP/1.0 200 OK\r\n\r\n" + good + "{}", good, "",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		dial := func(context.Context) (net.Conn, error) {
			near, far := net.Pipe()
			go func() {
				defer far.Close()
				if _, err := far.Read(make([]byte, 4096)); err != nil {
					return
				}
				_, _ = far.Write(answer) // the enclave may hang up
			}()
			return near, nil
		}
		id, err := enclave.TestingOnlyCredentials(t.Context(), dial)
		if (err == nil) != (id != "") {
			t.Errorf("access key %q and error %v", id, err)
		}
		if err == nil && !strings.HasPrefix(string(answer), "HTTP/") {
			t.Error("credentials of an answer that is not HTTP")
		}
	})
}

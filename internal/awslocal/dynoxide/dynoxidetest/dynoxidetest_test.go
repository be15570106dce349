package dynoxidetest_test

import (
	"net"
	"strings"
	"testing"

	"github.com/keyhold/keyhold/internal/awslocal/dynoxide"
	"github.com/keyhold/keyhold/internal/awslocal/dynoxide/dynoxidetest"
)

func TestTestsThatRunTogetherShareOneServer(t *testing.T) {
	t.Setenv(dynoxidetest.EndpointEnv, "")
	var first string
	t.Run("while used", func(t *testing.T) {
		first = dynoxidetest.Endpoint(t)
		t.Run("inner", func(t *testing.T) {
			if second := dynoxidetest.Endpoint(t); second != first {
				t.Errorf("endpoints %s and %s, want one", first, second)
			}
		})
		if !answers(t, first) {
			t.Error("the server ended with the inner test, while the outer one uses it")
		}
	})
	if first != "" && answers(t, first) {
		t.Error("the server outlives its last user")
	}
}

func TestTheEnvironmentNamesAnotherServer(t *testing.T) {
	const other = "http://192.0.2.1:8000"
	t.Setenv(dynoxidetest.EndpointEnv, other)
	if got := dynoxidetest.Endpoint(t); got != other {
		t.Errorf("endpoint %s, want %s", got, other)
	}
}

func TestAMissingServerSkipsUnlessItIsRequired(t *testing.T) {
	for _, tc := range []struct {
		name, require string
		want          outcome
	}{
		{"by default", "", outcome{skipped: true}},
		{"required", "1", outcome{failed: true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Setenv(dynoxidetest.EndpointEnv, "")
			t.Setenv(dynoxidetest.RequireEnv, tc.require)
			t.Setenv(dynoxide.BinaryEnv, "")
			t.Setenv("PATH", t.TempDir())
			t.Chdir(t.TempDir())
			got := observe(t, func(t testing.TB) {
				t.Helper()
				dynoxidetest.Endpoint(t)
			})
			if !strings.Contains(got.said, "make tools") {
				t.Errorf("said %q, want the command to run", got.said)
			}
			got.said = ""
			if got != tc.want {
				t.Errorf("outcome %+v, want %+v", got, tc.want)
			}
		})
	}
}

func answers(t *testing.T, endpoint string) bool {
	t.Helper()
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", strings.TrimPrefix(endpoint, "http://"))
	if err != nil {
		return false
	}
	return conn.Close() == nil
}

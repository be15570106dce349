package intake

import (
	"bufio"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
)

// Generate writes n random records of size bytes each as lines of input. The
// same seed gives the same lines, so an import of them can be continued. With
// ids the records are called "r-<seed>-<number>".
func Generate(w io.Writer, n, size int, seed uint64, ids bool) error {
	var key [32]byte
	binary.BigEndian.PutUint64(key[:], seed)
	random := rand.NewChaCha8(key)
	payload := make([]byte, size)
	out := bufio.NewWriter(w)
	for i := range n {
		random.Read(payload) //nolint:errcheck // it never fails
		text := base64.StdEncoding.EncodeToString(payload)
		line := `{"payload":"` + text + "\"}\n"
		if ids {
			line = fmt.Sprintf("{\"id\":\"r-%d-%d\",\"payload\":%q}\n", seed, i, text)
		}
		if _, err := out.WriteString(line); err != nil {
			return fmt.Errorf("write record %d: %w", i, err)
		}
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("write the records: %w", err)
	}
	return nil
}

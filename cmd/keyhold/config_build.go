package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/refusal"
)

// builtConfig is the JSON of config build and config show.
type builtConfig struct {
	PCR16  string         `json:"pcr16"`
	Config *config.Config `json:"config"`
}

type buildOptions struct {
	flags   map[string]*[]string // answers by name
	answers string               // file
	output  string
	force   bool
	yes     bool
	asJSON  bool
}

func configBuildCmd() *cobra.Command {
	o := buildOptions{flags: map[string]*[]string{}}
	c := &cobra.Command{
		Use:   "build",
		Short: "Make a config from a KMS key and a few answers",
		Long: `Make a config and print the PCR16 that it gives. On a terminal it asks, showing a
default for everything but the KMS key; elsewhere flags and --answers give the
answers, and each default that was taken is printed. A file of answers has lines
"NAME = ANSWER", named as the flags.

What an enclave would refuse is refused, and the error names the answer. A file that
is there with another content is left alone, unless --force is given.`,
		Example: `  # On a terminal: it asks
  keyhold config build -o config.json

  keyhold config build --kms-key-arn arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab \
    --keyring payouts --policies payouts:message --create secp256k1:payouts:1000 -o config.json

  keyhold config build --answers answers.txt -o config.json`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return o.run(c) },
	}
	f := c.Flags()
	for _, q := range questions {
		o.flags[q.name] = f.StringArray(q.name, nil, q.ask+" `ANSWER`: "+q.form)
	}
	f.StringVar(&o.answers, "answers", "", "`file` with lines NAME = ANSWER; flags come before it")
	f.StringVarP(&o.output, "output", "o", "-", "`file` to write, - for stdout")
	f.BoolVar(&o.force, "force", false, "replace a file that says something else")
	f.BoolVarP(&o.yes, "yes", "y", false, "do not ask: take the default for what was not answered")
	f.BoolVar(&o.asJSON, "json", false, "print PCR16 and config as JSON; needs -o")
	return c
}

func (o *buildOptions) run(c *cobra.Command) error {
	if o.asJSON && o.output == "-" {
		return cli.Usagef("--json needs -o FILE: the config is what stdout gets")
	}
	answers, err := o.given()
	if err != nil {
		return err
	}
	cfg := &config.Config{Version: 1}
	if in, ok := c.InOrStdin().(*os.File); ok && !o.yes && term.IsTerminal(int(in.Fd())) {
		err = ask(cfg, answers, bufio.NewReader(in), c.ErrOrStderr())
	} else {
		err = assume(cfg, answers, c.ErrOrStderr())
	}
	if err != nil {
		return err
	}
	raw, err := config.Encode(cfg)
	if err == nil {
		cfg, err = config.Parse(raw) // what an enclave does with it
	}
	if err != nil {
		return cli.Errorf(refusal.ConfigInvalid, "an enclave would refuse this config:\n%w", err)
	}
	if err := writeConfig(o.output, c.OutOrStdout(), raw, o.force); err != nil {
		return err
	}
	return o.report(c, cfg, raw)
}

// report says what was made: to stderr where stdout has the config.
func (o *buildOptions) report(c *cobra.Command, cfg *config.Config, raw []byte) error {
	pcr := config.PCR16(raw)
	if o.asJSON {
		return cli.PrintJSON(c.OutOrStdout(), builtConfig{fmt.Sprintf("%x", pcr), cfg})
	}
	w := c.OutOrStdout()
	if o.output == "-" {
		w = c.ErrOrStderr()
	}
	var b lines
	for _, l := range configLines(cfg) {
		b.add(l.name, "%s", l.text)
	}
	b.add("PCR16", "%x", pcr)
	_, err := io.WriteString(w, b.String())
	return err
}

// given are the answers of the flags and the file; a flag counts more.
func (o *buildOptions) given() (map[string]given, error) {
	out := map[string]given{}
	if o.answers != "" {
		f, err := os.Open(o.answers)
		if err != nil {
			return nil, fmt.Errorf("read the answers: %w", err)
		}
		defer f.Close() //nolint:errcheck // it was only read
		if out, err = readAnswers(f, o.answers); err != nil {
			return nil, cli.Usagef("%w", err)
		}
	}
	for name, list := range o.flags {
		if len(*list) > 0 {
			out[name] = given{strings.Join(*list, " "), "--" + name}
		}
	}
	return out, nil
}

// assume takes the default for what nobody answered, and says so.
func assume(cfg *config.Config, answers map[string]given, say io.Writer) error {
	var errs []error
	for i := range questions {
		q := &questions[i]
		a, ok := answers[q.name]
		if !ok {
			if q.initial == nil {
				errs = append(errs, fmt.Errorf("--%s: it has no default: want the %s", q.name, q.form))
				continue
			}
			a = given{q.initial(cfg), "default of " + q.name}
			if _, err := fmt.Fprintf(say, "%s = %s (default)\n", q.name, a.text); err != nil {
				return fmt.Errorf("print a default: %w", err)
			}
		}
		// A default that follows from a wrong answer is not the one to complain of.
		if err := q.answer(cfg, a.text); err != nil && (ok || len(errs) == 0) {
			errs = append(errs, q.wrong(a.where, err))
		}
	}
	if len(errs) > 0 {
		return cli.Usagef("%w", errors.Join(errs...))
	}
	return nil
}

// wrong names the answer in an error about it.
func (q *question) wrong(where string, err error) error {
	if !strings.HasSuffix(where, q.name) {
		where += ": " + q.name
	}
	return fmt.Errorf("%s: %w (want: %s)", where, err, q.form)
}

// maxTries is how often a person is asked the same.
const maxTries = 5

// ask lets a person answer what flags and file did not. A wrong answer is told
// and asked for again.
func ask(cfg *config.Config, answers map[string]given, in *bufio.Reader, out io.Writer) error {
	for i := range questions {
		q := &questions[i]
		if a, ok := answers[q.name]; ok {
			if err := q.answer(cfg, a.text); err != nil {
				return cli.Usagef("%w", q.wrong(a.where, err))
			}
			continue
		}
		if err := q.askOne(cfg, in, out); err != nil {
			return err
		}
	}
	return nil
}

func (q *question) askOne(cfg *config.Config, in *bufio.Reader, out io.Writer) error {
	initial := ""
	if q.initial != nil {
		initial = q.initial(cfg)
	}
	for range maxTries {
		text := fmt.Sprintf("%s\n  %s", q.ask, q.form)
		if initial != "" {
			text += fmt.Sprintf(" [%s]", initial)
		}
		if _, err := fmt.Fprintf(out, "%s: ", text); err != nil {
			return fmt.Errorf("ask for %s: %w", q.name, err)
		}
		line, err := in.ReadString('\n')
		if err != nil {
			return cli.Usagef("%s: no answer: %w", q.name, err)
		}
		if line = strings.TrimSpace(line); line == "" {
			line = initial
		}
		wrong := q.answer(cfg, line)
		if wrong == nil {
			return nil
		}
		if _, err := fmt.Fprintf(out, "  that will not do: %v\n", wrong); err != nil {
			return fmt.Errorf("ask for %s: %w", q.name, err)
		}
	}
	return cli.Usagef("%s: no answer that an enclave would take", q.name)
}

// writeConfig writes raw. A file of another content stays as it is unless force
// is set, also where it appears meanwhile.
func writeConfig(path string, stdout io.Writer, raw []byte, force bool) error {
	if path == "-" || force {
		return cli.WriteOutput(path, stdout, func(w io.Writer) error {
			_, err := bytes.NewReader(raw).WriteTo(w)
			return err
		})
	}
	dir, err := os.MkdirTemp(filepath.Dir(path), ".config-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer os.RemoveAll(dir) //nolint:errcheck // a left folder harms nobody
	whole := filepath.Join(dir, "config")
	if err := cli.WriteOutput(whole, nil, func(w io.Writer) error {
		_, err := bytes.NewReader(raw).WriteTo(w)
		return err
	}); err != nil {
		return err
	}
	err = os.Link(whole, path) // in contrast to a rename it replaces nothing
	if !errors.Is(err, os.ErrExist) {
		return err
	}
	old, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("compare with %s: %w", path, err)
	}
	//nolint:forbidigo // configs are public
	if !bytes.Equal(old, raw) {
		return cli.Errorf(refusal.ConfigConflict, "%s is there and says something else: compare it with keyhold config show, and give --force to replace it; its PCR16 is %x, the new one's %x",
			path, config.PCR16(old), config.PCR16(raw))
	}
	return nil
}

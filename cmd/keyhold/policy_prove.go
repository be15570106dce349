package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/keypolicy"
)

func policyProveCmd() *cobra.Command {
	var o policyOptions
	var asJSON, all bool
	c := &cobra.Command{
		Use:   "prove [FILE]",
		Short: "Prove who can and who cannot make KMS release the key",
		Long: `Read a key policy, from FILE or stdin, as it is or as aws kms get-key-policy prints
it, and answer every question there is about it: each action of KMS, asked by the
parent's role, an administrator, another principal of the account, its root user,
another account and an AWS service, showing no attestation document, that of a debug
enclave, of another image, of an admitted image with another config, of one pair's
image with the other's config, and of each admitted pair. Everybody is taken to have
whatever permissions IAM can give.

The questions are put to the policy as it is, with Allows as they are added by
mistake, and without its Denies: each of both locks must hold alone. What the flags
name must be exactly what the policy says; what they leave open is read from the
policy and printed. A policy with a part that is not understood is not judged.

It needs no AWS account. An enclave runs the same proof on what KMS answers before it
asks for any key. The exit code is 1 where an answer is wrong, and the first wrong one
is the error.`,
		Example: `  # What stands in the account now
  aws kms get-key-policy --key-id 1234abcd-12ab-34cd-56ef-1234567890ab --policy-name default | keyhold policy prove

  # A file, against the pair that shall be admitted
  keyhold policy prove policy.json --measurements dist/amd64/measurements.json --config config.json

  # Every single question
  keyhold policy prove policy.json --all

  # For a script
  keyhold policy prove policy.json --json | jq '.findings[].text'`,
		Args: cobra.MaximumNArgs(1),
	}
	o.addFlags(c, "")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.Flags().BoolVar(&all, "all", false, "print every question on a line of its own")
	c.RunE = func(c *cobra.Command, args []string) error {
		path := "-"
		if len(args) > 0 {
			path = args[0]
		}
		p, err := readPolicy(c, path)
		if err != nil {
			return err
		}
		want, err := o.expectation(c, p)
		if err != nil {
			return err
		}
		r, err := p.Prove(want)
		switch {
		case errors.Is(err, keypolicy.ErrNotUnderstood):
			return cli.Errorf(refusal.PolicyUnread, "%w", err)
		case errors.Is(err, keypolicy.ErrRequest):
			return cli.Usagef("--account: %w", err)
		}
		write := printProof
		if asJSON {
			write = printProofJSON
		}
		if err := write(c.OutOrStdout(), p, &r, all); err != nil {
			return err
		}
		if err != nil {
			return cli.Errorf(refusal.PolicyLoose, "%w", err)
		}
		return nil
	}
	return c
}

// expectation is what the flags say of the policy. It must be exact.
func (o *policyOptions) expectation(c *cobra.Command, p keypolicy.Policy) (want keypolicy.Expectation, err error) {
	want = keypolicy.Expectation{Exact: true, Parent: o.parent, Admins: o.admins, Mode: keypolicy.Mode(o.mode)}
	if want.Mode != "" && want.Mode != keypolicy.Managed && want.Mode != keypolicy.Sealed {
		return want, cli.Usagef("--mode: want managed or sealed")
	}
	account := ""
	if o.nobody || o.wantsPairs() {
		if want.Pairs, account, err = o.readPairs(); err != nil {
			return want, err
		}
	}
	if want.PCR8, want.PCR3, err = o.registers(); err != nil {
		return want, err
	}
	if c.Flags().Changed("creating") {
		want.Creating = &o.creating
	}
	if want.Account = o.accountOf(account); want.Account == "" {
		want.Account, err = onlyAccount(p)
	}
	return want, err
}

// proofReport is the JSON of a proof.
type proofReport struct {
	Holds     bool                 `json:"holds"`
	SHA256    string               `json:"sha256"` // of the canonical form; boot statements carry it
	Mode      keypolicy.Mode       `json:"mode"`
	Pairs     []keypolicy.Pair     `json:"pairs"`
	Parent    string               `json:"parent_role"`
	Admins    []string             `json:"admin_roles"`
	Creating  bool                 `json:"creating"`
	Requests  int                  `json:"requests"`
	Findings  []keypolicy.Finding  `json:"findings"`
	Questions []keypolicy.Question `json:"questions"`
}

func printProofJSON(w io.Writer, _ keypolicy.Policy, r *keypolicy.Result, _ bool) error {
	report := proofReport{
		Holds: len(r.Findings) == 0, SHA256: hex.EncodeToString(r.Hash[:]), Mode: r.Mode, Pairs: r.Pairs, Parent: r.Parent,
		Admins: r.Admins, Creating: r.Creating, Requests: r.Requests, Findings: r.Findings, Questions: r.Questions,
	}
	if report.Pairs == nil {
		report.Pairs = []keypolicy.Pair{}
	}
	if report.Admins == nil {
		report.Admins = []string{}
	}
	if report.Findings == nil {
		report.Findings = []keypolicy.Finding{}
	}
	return cli.PrintJSON(w, report)
}

func printProof(w io.Writer, p keypolicy.Policy, r *keypolicy.Result, all bool) error {
	statements := p.Statements()
	if err := printProofHead(w, len(statements), r); err != nil {
		return err
	}
	t := newTable(w, false, column{"who", 34}, column{"showing", 51}, column{"asks for", 44}, column{"answer", 7}, column{"by", 0})
	for _, row := range rowsOf(r.Questions, all) {
		by := "no statement"
		if row.By > 0 {
			by = strings.TrimSpace(fmt.Sprintf("%d %s", row.By, statements[row.By-1].Sid))
		}
		if err := t.row(nil, row.Who, dash(row.Shown), row.asks(), row.answer(), by); err != nil {
			return err
		}
	}
	return printVerdict(w, r)
}

func printProofHead(w io.Writer, statements int, r *keypolicy.Result) error {
	text := fmt.Sprintf("policy       %d statements, sha256 %x\nmode         %s\n", statements, r.Hash, r.Mode)
	for i, p := range r.Pairs {
		text += fmt.Sprintf("pair %d       PCR0  %s\n             PCR16 %s\n", i+1, p.PCR0, p.PCR16)
	}
	if len(r.Pairs) == 0 {
		text += "pairs        none\n"
	}
	creating := "closed"
	if r.Creating {
		creating = "open to the pairs"
	}
	text += fmt.Sprintf("parent role  %s\nadmins       %s\ncreating     %s\n\n", dash(r.Parent), dash(strings.Join(r.Admins, ", ")), creating)
	_, err := io.WriteString(w, text)
	return err
}

func printVerdict(w io.Writer, r *keypolicy.Result) error {
	names := accountActions()
	text := fmt.Sprintf("\nno key's     %d actions are about no key, and no key policy is asked: %s\n", len(names), strings.Join(names, ", "))
	text += fmt.Sprintf("asked        %d questions about %d actions, in %d requests\n", len(r.Questions), len(keypolicy.Actions()), r.Requests)
	for i, f := range r.Findings {
		if i == maxFindings {
			text += fmt.Sprintf("             and %d more (--json has them all)\n", len(r.Findings)-i)
			break
		}
		text += fmt.Sprintf("%-11s  %s\n", f.Kind, f.Text)
	}
	if len(r.Findings) == 0 {
		text += "holds        yes\n"
	}
	_, err := io.WriteString(w, text)
	return err
}

// maxFindings is how many wrong answers a person is shown.
const maxFindings = 20

// questionRow is one line: questions of one kind with one answer.
type questionRow struct {
	keypolicy.Question
	actions []string
}

// asks names the actions, or how many there are.
func (q *questionRow) asks() string {
	if len(q.actions) <= 2 {
		return strings.Join(q.actions, ", ")
	}
	return fmt.Sprintf("%d %s actions", len(q.actions), q.Class)
}

func (q *questionRow) answer() string {
	text := "no"
	if q.Allowed {
		text = "yes"
	}
	if q.Want == keypolicy.Yes && !q.Allowed || q.Want == keypolicy.No && q.Allowed {
		text += " !"
	}
	return text
}

// rowsOf puts questions together that are asked by the same with the same, are of
// one class and have one answer by one statement; and those rows that differ in
// nothing but what is shown, if they are there for everything that can be shown.
func rowsOf(questions []keypolicy.Question, all bool) []*questionRow {
	type kind struct {
		who, shown, class string
		want              keypolicy.Answer
		allowed           bool
		by                int
		actions           string
	}
	known, rows := map[kind]*questionRow{}, []*questionRow{}
	documents := map[string]bool{}
	for _, q := range questions {
		if q.Class == keypolicy.Account.String() && !all {
			continue
		}
		if q.Shown != "" {
			documents[q.Shown] = true
		}
		k := kind{q.Who, q.Shown, q.Class, q.Want, q.Allowed, q.By, ""}
		row := known[k]
		if row == nil || all {
			row = &questionRow{Question: q}
			known[k], rows = row, append(rows, row)
		}
		row.actions = append(row.actions, q.Action)
	}
	if all {
		return rows
	}
	same := map[kind][]*questionRow{}
	for _, r := range rows {
		k := kind{r.Who, "", r.Class, r.Want, r.Allowed, r.By, strings.Join(r.actions, " ")}
		same[k] = append(same[k], r)
	}
	var out []*questionRow
	for _, r := range rows {
		k := kind{r.Who, "", r.Class, r.Want, r.Allowed, r.By, strings.Join(r.actions, " ")}
		switch {
		case r.Shown == "" || len(same[k]) < len(documents):
			out = append(out, r)
		case same[k][0] == r:
			r.Shown = "whatever is shown"
			out = append(out, r)
		}
	}
	return out
}

// accountActions names those that no key policy is asked about.
func accountActions() (names []string) {
	for _, a := range keypolicy.Actions() {
		if a.Class == keypolicy.Account {
			names = append(names, strings.TrimPrefix(a.Name, "kms:"))
		}
	}
	return names
}

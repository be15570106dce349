package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/keypolicy"
)

func policyDiffCmd() *cobra.Command {
	var account string
	var asJSON bool
	c := &cobra.Command{
		Use:   "diff BEFORE AFTER",
		Short: "Compare two key policies by what they let through",
		Long: `Print which statements one policy has and the other has not, and who gains or
loses what: principal, what it must show, actions. Statements in another order, lists
in another order and another layout are no difference. Either file may be a policy or
what aws kms get-key-policy prints; one of them may be - for stdin.

Everybody is taken to have whatever permissions IAM can give.`,
		Example: `  # What a deployment would change
  aws kms get-key-policy --key-id 1234abcd-12ab-34cd-56ef-1234567890ab --policy-name default | \
    keyhold policy diff - policy.json

  # For a script
  keyhold policy diff before.json after.json --json | jq '.gains'`,
		Args: cobra.ExactArgs(2),
	}
	c.Flags().StringVar(&account, "account", "", "account that owns the key, 12 `digits`; by default the one that the policies name")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.RunE = func(c *cobra.Command, args []string) error {
		if args[0] == "-" && args[1] == "-" {
			return cli.Usagef("only one of the policies can come from stdin")
		}
		before, err := readPolicy(c, args[0])
		if err != nil {
			return err
		}
		after, err := readPolicy(c, args[1])
		if err != nil {
			return err
		}
		if account == "" {
			if account, err = onlyAccount(before, after); err != nil {
				return err
			}
		}
		d, err := keypolicy.Diff(before, after, account)
		if err != nil {
			return cli.Errorf(refusal.PolicyUnread, "%w", err)
		}
		if asJSON {
			return cli.PrintJSON(c.OutOrStdout(), d)
		}
		return printDifference(c.OutOrStdout(), &d)
	}
	return c
}

func printDifference(w io.Writer, d *keypolicy.Difference) error {
	var b strings.Builder
	if d.Same() {
		b.WriteString("no difference\n")
	}
	statements := func(title, mark string, list []string) {
		for _, text := range list {
			fmt.Fprintf(&b, "%s\n%s%s\n\n", title, mark, strings.ReplaceAll(text, "\n", "\n"+mark))
		}
	}
	statements("statement removed", "- ", d.Removed)
	statements("statement added", "+ ", d.Added)
	access := func(verb, mark string, list []keypolicy.Access) {
		for _, a := range list {
			fmt.Fprintf(&b, "%s %s %s: %s\n", mark, a.Who, verb, strings.Join(a.Actions, ", "))
			if a.Showing != "" {
				fmt.Fprintf(&b, "    showing %s\n", a.Showing)
			}
		}
	}
	access("loses", "-", d.Loses)
	access("gains", "+", d.Gains)
	if !d.Same() && len(d.Gains)+len(d.Loses) == 0 {
		b.WriteString("nobody gains or loses anything\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

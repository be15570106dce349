package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
)

// build says which source this program was made of.
type build struct {
	Version  string `json:"version"`
	Revision string `json:"revision"` // of the repository; empty where the build did not know it
	Modified bool   `json:"modified"` // the source was not exactly that revision
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

func thisBuild() build {
	b := build{Version: "unknown", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	b.Version = info.Main.Version
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			b.Revision = s.Value
		case "vcs.modified":
			b.Modified = s.Value == "true"
		}
	}
	return b
}

func versionCmd() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "version",
		Short: "Print the version of this program",
		Long:  "Print the version, the revision it was built from, the Go release and the platform.",
		Example: `  keyhold version
  keyhold version --json`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			b := thisBuild()
			if asJSON {
				return cli.PrintJSON(c.OutOrStdout(), b)
			}
			changed := ""
			if b.Modified {
				changed = ", modified"
			}
			if b.Revision == "" {
				b.Revision = "unknown"
			}
			_, err := fmt.Fprintf(c.OutOrStdout(), "keyhold %s (revision %s%s) %s %s\n", b.Version, b.Revision, changed, b.Go, b.Platform)
			return err
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

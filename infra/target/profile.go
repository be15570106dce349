package target

import (
	"fmt"
	"strings"
)

// Profile is how much is spent on staying up and on keeping what there is.
type Profile struct {
	Name        string
	Min, Max    int  // instances
	Keep        bool // keys, role, tables and buckets outlive the stack, and are protected from deletion
	Endpoints   int  // zones that have interface endpoints: each costs per zone and hour
	Trail       bool // a CloudTrail of its own, which the events of the keys need
	LogDays     int
	KeyDays     int // that KMS waits before it deletes a key
	StateEvery  int // minutes between two reports of the backlog
	Description string
}

var profiles = []Profile{
	{
		Name: "dev", Min: 1, Max: 2, Endpoints: 1, LogDays: 7, KeyDays: 7, StateEvery: 5,
		Description: "to try things: one instance, and nothing of it is kept when the stack is destroyed",
	},
	{
		Name: "prod", Min: 2, Max: 4, Keep: true, Endpoints: 2, Trail: true, LogDays: 90, KeyDays: 30, StateEvery: 1,
		Description: "two instances in two zones; keys, tables and buckets stay whatever happens to the stack",
	},
}

// Profiles returns all of them.
func Profiles() []Profile { return append([]Profile(nil), profiles...) }

func profile(name string) (Profile, error) {
	var names []string
	for _, p := range profiles {
		if p.Name == name {
			return p, nil
		}
		names = append(names, p.Name)
	}
	return Profile{}, fmt.Errorf("profile %q: want one of %s", name, strings.Join(names, ", "))
}

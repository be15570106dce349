package main

import (
	"reflect"
	"strings"
	"testing"

	"github.com/keyhold/keyhold/internal/config"
)

// A field without a question would be left empty by config build.
func TestEveryFieldOfAConfigHasAQuestion(t *testing.T) {
	asked := map[string]bool{"version": true} // there is one
	for _, q := range questions {
		asked[q.field] = true
	}
	fields := map[string]bool{}
	for f := range reflect.TypeFor[config.Config]().Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		fields[name] = true
		if !asked[name] {
			t.Errorf("%s has no question: add a row to questions, and a line to configLines", name)
		}
	}
	for name := range asked {
		if !fields[name] {
			t.Errorf("there is a question for %s, which is no field of a config", name)
		}
	}
}

func TestDefaultsMakeAConfigThatAnEnclaveTakes(t *testing.T) {
	c := &config.Config{Version: 1}
	for i := range questions {
		q := &questions[i]
		text := "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
		if q.initial != nil {
			text = q.initial(c)
		} else if q.name != "kms-key-arn" {
			t.Errorf("%s has no default", q.name)
		}
		if err := q.answer(c, text); err != nil {
			t.Errorf("%s = %s: %v", q.name, text, err)
		}
	}
	raw, err := config.Encode(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := config.Parse(raw); err != nil {
		t.Error(err)
	}
}

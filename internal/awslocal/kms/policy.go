package kms

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
)

// maxPolicy is AWS's limit for a key policy, in bytes.
const maxPolicy = 32 << 10

// keyPolicy is a policy of which every part is understood.
type keyPolicy struct{ statements []statement }

type statement struct {
	deny       bool
	principals []string
	actions    []string // lower case, with wildcards
	conditions []condition
}

type condition struct {
	operator string
	key      string // lower case
	values   []string
}

var (
	errPolicy = errors.New("policy is not understood")

	accountForm   = regexp.MustCompile(`^[0-9]{12}$`)
	principalForm = regexp.MustCompile(`^arn:aws:(iam::[0-9]{12}:(root|role/[\w+=,.@/-]+|user/[\w+=,.@/-]+)|sts::[0-9]{12}:assumed-role/[\w+=,.@-]+/[\w+=,.@-]+)$`)
	actionForm    = regexp.MustCompile(`^(\*|kms:[A-Za-z*?]+)$`)
	pcrForm       = regexp.MustCompile(`^kms:recipientattestation:(imagesha384|pcr([0-9]|[12][0-9]|3[01]))$`)
)

// parsePolicy refuses every element, principal, operator and condition key that
// decide would have to ignore.
func parsePolicy(text []byte, keyARN string) (keyPolicy, error) {
	if len(text) > maxPolicy {
		return keyPolicy{}, fmt.Errorf("%w: longer than 32 KB", errPolicy)
	}
	top, err := object(text, "Version", "Id", "Statement")
	if err != nil {
		return keyPolicy{}, err
	}
	if version, err := oneString(top["Version"]); err != nil || version != "2012-10-17" {
		return keyPolicy{}, fmt.Errorf("%w: Version must be 2012-10-17", errPolicy)
	}
	var list []json.RawMessage
	if err := json.Unmarshal(top["Statement"], &list); err != nil {
		list = []json.RawMessage{top["Statement"]}
	}
	if len(list) == 0 {
		return keyPolicy{}, fmt.Errorf("%w: no statement", errPolicy)
	}
	var p keyPolicy
	for i, raw := range list {
		st, err := parseStatement(raw, keyARN)
		if err != nil {
			return keyPolicy{}, fmt.Errorf("statement %d: %w", i, err)
		}
		p.statements = append(p.statements, st)
	}
	return p, nil
}

func parseStatement(raw json.RawMessage, keyARN string) (statement, error) {
	fields, err := object(raw, "Sid", "Effect", "Principal", "Action", "Resource", "Condition")
	if err != nil {
		return statement{}, err
	}
	var st statement
	switch effect, err := oneString(fields["Effect"]); {
	case err == nil && effect == "Deny":
		st.deny = true
	case err != nil || effect != "Allow":
		return statement{}, fmt.Errorf("%w: Effect must be Allow or Deny", errPolicy)
	}
	if st.principals, err = parsePrincipals(fields["Principal"]); err != nil {
		return statement{}, err
	}
	if st.actions, err = stringList(fields["Action"]); err != nil {
		return statement{}, fmt.Errorf("action: %w", err)
	}
	for i, a := range st.actions {
		if !actionForm.MatchString(a) {
			return statement{}, fmt.Errorf("%w: an action is neither * nor of kms", errPolicy)
		}
		st.actions[i] = strings.ToLower(a)
	}
	resources, err := stringList(fields["Resource"])
	if err != nil || slices.ContainsFunc(resources, func(r string) bool { return r != "*" && r != keyARN }) {
		return statement{}, fmt.Errorf("%w: Resource must be * or the key itself", errPolicy)
	}
	if fields["Condition"] != nil {
		st.conditions, err = parseConditions(fields["Condition"])
	}
	return st, err
}

func parsePrincipals(raw json.RawMessage) ([]string, error) {
	if text, err := oneString(raw); err == nil {
		if text != "*" {
			return nil, fmt.Errorf("%w: Principal must be * or {\"AWS\": ...}", errPolicy)
		}
		return []string{text}, nil
	}
	fields, err := object(raw, "AWS")
	if err != nil {
		return nil, fmt.Errorf("principal: %w", err)
	}
	list, err := stringList(fields["AWS"])
	if err != nil {
		return nil, fmt.Errorf("principal: %w", err)
	}
	for i, p := range list {
		switch {
		case p == "*", principalForm.MatchString(p):
		case accountForm.MatchString(p):
			list[i] = "arn:aws:iam::" + p + ":root"
		default:
			return nil, fmt.Errorf("%w: a principal is no account, role, user or session", errPolicy)
		}
	}
	return list, nil
}

func parseConditions(raw json.RawMessage) ([]condition, error) {
	operatorNames, err := object(raw)
	if err != nil {
		return nil, fmt.Errorf("condition: %w", err)
	}
	var out []condition
	for operator, body := range operatorNames {
		if operators[operator] == nil && operator != "Null" {
			return nil, fmt.Errorf("%w: a condition operator is not emulated", errPolicy)
		}
		keys, err := object(body)
		if err != nil {
			return nil, fmt.Errorf("condition: %w", err)
		}
		for key, rawValues := range keys {
			c := condition{operator: operator, key: strings.ToLower(key)}
			if c.values, err = conditionValues(operator, rawValues); err != nil {
				return nil, fmt.Errorf("condition: %w", err)
			}
			if !knownKey(c.key) {
				return nil, fmt.Errorf("%w: a condition key is not emulated", errPolicy)
			}
			out = append(out, c)
		}
	}
	return out, nil
}

func conditionValues(operator string, raw json.RawMessage) ([]string, error) {
	if operator == "Null" {
		if text := strings.Trim(string(raw), `"`); text == "true" || text == "false" {
			return []string{text}, nil
		}
		return nil, fmt.Errorf("%w: Null takes true or false", errPolicy)
	}
	values, err := stringList(raw)
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(values, func(v string) bool { return strings.Contains(v, "${") }) {
		return nil, fmt.Errorf("%w: policy variables are not emulated", errPolicy)
	}
	return values, nil
}

func knownKey(key string) bool {
	switch key {
	case "aws:principalarn", "aws:principalaccount", "kms:calleraccount":
		return true
	}
	name, ok := strings.CutPrefix(key, "kms:encryptioncontext:")
	return ok && name != "" || pcrForm.MatchString(key)
}

// object reads a JSON object, refusing repeated and, where some are given, unknown names.
func object(raw []byte, known ...string) (map[string]json.RawMessage, error) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	if token, err := dec.Token(); err != nil || token != json.Delim('{') {
		return nil, fmt.Errorf("%w: want a JSON object", errPolicy)
	}
	out := map[string]json.RawMessage{}
	for dec.More() {
		token, err := dec.Token()
		name, ok := token.(string)
		if err != nil || !ok {
			return nil, fmt.Errorf("%w: not JSON", errPolicy)
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return nil, fmt.Errorf("%w: not JSON", errPolicy)
		}
		if _, twice := out[name]; twice || len(known) > 0 && !slices.Contains(known, name) {
			return nil, fmt.Errorf("%w: an element is unknown or repeated", errPolicy)
		}
		out[name] = value
	}
	if _, err := dec.Token(); err != nil {
		return nil, fmt.Errorf("%w: not JSON", errPolicy)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: trailing data", errPolicy)
	}
	return out, nil
}

func oneString(raw json.RawMessage) (string, error) {
	if len(raw) == 0 || raw[0] != '"' {
		return "", fmt.Errorf("%w: want a string", errPolicy)
	}
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		return "", fmt.Errorf("%w: want a string", errPolicy)
	}
	return s, nil
}

func stringList(raw json.RawMessage) ([]string, error) {
	if s, err := oneString(raw); err == nil {
		return []string{s}, nil
	}
	var list []json.RawMessage
	if err := json.Unmarshal(raw, &list); err != nil || len(list) == 0 {
		return nil, fmt.Errorf("%w: want a string or a list of strings", errPolicy)
	}
	out := make([]string, len(list))
	for i, item := range list {
		s, err := oneString(item)
		if err != nil {
			return nil, err
		}
		out[i] = s
	}
	return out, nil
}

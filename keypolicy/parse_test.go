package keypolicy_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/keypolicy"
)

const sound = `{"Version":"2012-10-17","Statement":[{"Sid":"a b","Effect":"Allow","Principal":{"AWS":"111122223333"},` +
	`"Action":["kms:Decrypt"],"Resource":"*","Condition":{"StringEqualsIgnoreCase":{"kms:RecipientAttestation:PCR0":["@"]}}}]}`

func soundPolicy() string { return strings.ReplaceAll(sound, "@", strings.Repeat("Ab", 48)) }

func TestWhatCannotBeUnderstoodIsRefused(t *testing.T) {
	replace := func(old, other string) string {
		if !strings.Contains(soundPolicy(), old) {
			t.Fatalf("there is no %q", old)
		}
		return strings.Replace(soundPolicy(), old, other, 1)
	}
	pcrs := `{"kms:RecipientAttestation:PCR0":["` + strings.Repeat("Ab", 48) + `"]}`
	operator := func(name, body string) string {
		return replace(`"StringEqualsIgnoreCase":`+pcrs, `"`+name+`":`+body)
	}
	for name, tc := range map[string]struct {
		text string
		want error
	}{
		"nothing":                     {"", keypolicy.ErrMalformed},
		"no JSON":                     {"policy", keypolicy.ErrMalformed},
		"a list":                      {"[]", keypolicy.ErrMalformed},
		"null":                        {"null", keypolicy.ErrMalformed},
		"two values":                  {soundPolicy() + "{}", keypolicy.ErrMalformed},
		"trailing text":               {soundPolicy() + "x", keypolicy.ErrMalformed},
		"cut off":                     {soundPolicy()[:len(soundPolicy())-1], keypolicy.ErrMalformed},
		"bad UTF-8":                   {replace("a b", "a\xffb"), keypolicy.ErrMalformed},
		"a comma too many":            {replace(`"Resource":"*",`, `"Resource":"*",,`), keypolicy.ErrMalformed},
		"too long":                    {soundPolicy() + strings.Repeat(" ", 32<<10), keypolicy.ErrMalformed},
		"too deep":                    {replace(`["kms:Decrypt"]`, strings.Repeat("[", 20)+strings.Repeat("]", 20)), keypolicy.ErrMalformed},
		"a name twice":                {replace(`"Effect":"Allow"`, `"Effect":"Deny","Effect":"Allow"`), keypolicy.ErrMalformed},
		"a name twice, escaped":       {replace(`"Effect":"Allow"`, `"Effect":"Deny","\u0045ffect":"Allow"`), keypolicy.ErrMalformed},
		"a key twice":                 {replace(pcrs, pcrs[:len(pcrs)-1]+","+pcrs[1:]), keypolicy.ErrMalformed},
		"a version twice":             {replace(`{"Version"`, `{"Version":"2008-10-17","Version"`), keypolicy.ErrMalformed},
		"another case":                {replace(`"Effect"`, `"effect"`), keypolicy.ErrNotUnderstood},
		"another case of Statement":   {replace(`"Statement"`, `"statement"`), keypolicy.ErrNotUnderstood},
		"an unknown element":          {replace(`"Effect"`, `"Comment":"x","Effect"`), keypolicy.ErrNotUnderstood},
		"an old version":              {replace("2012-10-17", "2008-10-17"), keypolicy.ErrNotUnderstood},
		"no version":                  {replace(`"Version":"2012-10-17",`, ""), keypolicy.ErrNotUnderstood},
		"no statement":                {`{"Version":"2012-10-17","Statement":[]}`, keypolicy.ErrNotUnderstood},
		"no Statement":                {`{"Version":"2012-10-17"}`, keypolicy.ErrMalformed},
		"too many statements":         {policyOf(strings.Split(strings.Repeat(statement("Deny", `"*"`, `"kms:Sign"`, "")+";", 65), ";")[:65]...), keypolicy.ErrNotUnderstood},
		"a statement that is text":    {`{"Version":"2012-10-17","Statement":["x"]}`, keypolicy.ErrMalformed},
		"an Id that is a number":      {replace(`{"Version"`, `{"Id":1,"Version"`), keypolicy.ErrMalformed},
		"a Sid that is a number":      {replace(`"a b"`, `7`), keypolicy.ErrMalformed},
		"a Sid with a control":        {replace(`a b`, `a\u0007b`), keypolicy.ErrMalformed},
		"an Effect in another case":   {replace(`"Allow"`, `"allow"`), keypolicy.ErrMalformed},
		"no Effect":                   {replace(`"Effect":"Allow",`, ""), keypolicy.ErrMalformed},
		"no Principal":                {replace(`"Principal":{"AWS":"111122223333"},`, ""), keypolicy.ErrNotUnderstood},
		"no Action":                   {replace(`"Action":["kms:Decrypt"],`, ""), keypolicy.ErrNotUnderstood},
		"no Resource":                 {replace(`"Resource":"*",`, ""), keypolicy.ErrNotUnderstood},
		"NotPrincipal":                {replace(`"Principal"`, `"NotPrincipal"`), keypolicy.ErrNotUnderstood},
		"NotAction":                   {replace(`"Action"`, `"NotAction"`), keypolicy.ErrNotUnderstood},
		"NotResource":                 {replace(`"Resource"`, `"NotResource"`), keypolicy.ErrNotUnderstood},
		"another resource":            {replace(`"Resource":"*"`, `"Resource":"arn:aws:kms:eu-central-1:111122223333:key/1"`), keypolicy.ErrNotUnderstood},
		"two resources":               {replace(`"Resource":"*"`, `"Resource":["*","*"]`), keypolicy.ErrNotUnderstood},
		"an empty list of actions":    {replace(`["kms:Decrypt"]`, `[]`), keypolicy.ErrMalformed},
		"an action that is a number":  {replace(`["kms:Decrypt"]`, `[1]`), keypolicy.ErrMalformed},
		"an unknown action":           {replace(`kms:Decrypt`, `kms:DecryptAll`), keypolicy.ErrNotUnderstood},
		"an action of another":        {replace(`kms:Decrypt`, `s3:GetObject`), keypolicy.ErrNotUnderstood},
		"a wildcard for nothing":      {replace(`kms:Decrypt`, `kms:Melt*`), keypolicy.ErrNotUnderstood},
		"a text as principal":         {replace(`{"AWS":"111122223333"}`, `"111122223333"`), keypolicy.ErrMalformed},
		"no principal in the object":  {replace(`{"AWS":"111122223333"}`, `{}`), keypolicy.ErrMalformed},
		"Federated":                   {replace(`{"AWS":"111122223333"}`, `{"Federated":"accounts.google.com"}`), keypolicy.ErrNotUnderstood},
		"CanonicalUser":               {replace(`{"AWS":"111122223333"}`, `{"CanonicalUser":"79a59d"}`), keypolicy.ErrNotUnderstood},
		"aws in lower case":           {replace(`"AWS"`, `"aws"`), keypolicy.ErrNotUnderstood},
		"a deleted role":              {replace(`"111122223333"`, `"AROAIOSFODNN7EXAMPLE"`), keypolicy.ErrNotUnderstood},
		"a wildcard in a role":        {replace(`"111122223333"`, `"arn:aws:iam::111122223333:role/*"`), keypolicy.ErrNotUnderstood},
		"a federated user":            {replace(`"111122223333"`, `"arn:aws:sts::111122223333:federated-user/bob"`), keypolicy.ErrNotUnderstood},
		"a service that is none":      {replace(`"AWS":"111122223333"`, `"Service":"example.com"`), keypolicy.ErrNotUnderstood},
		"every service":               {replace(`"AWS":"111122223333"`, `"Service":"*"`), keypolicy.ErrNotUnderstood},
		"a condition that is a list":  {replace(`"Condition":{`, `"Condition":[],"X":{`), keypolicy.ErrNotUnderstood},
		"a null condition":            {strings.SplitN(soundPolicy(), `"Condition":`, 2)[0] + `"Condition":null}]}`, keypolicy.ErrMalformed},
		"no key under an operator":    {operator("StringEquals", `{}`), keypolicy.ErrMalformed},
		"IfExists":                    {operator("StringEqualsIgnoreCaseIfExists", pcrs), keypolicy.ErrNotUnderstood},
		"ForAnyValue":                 {operator("ForAnyValue:StringEquals", pcrs), keypolicy.ErrNotUnderstood},
		"ForAllValues":                {operator("ForAllValues:StringEquals", pcrs), keypolicy.ErrNotUnderstood},
		"Bool":                        {operator("Bool", `{"kms:GrantIsForAWSResource":"true"}`), keypolicy.ErrNotUnderstood},
		"an operator in another case": {operator("stringequals", pcrs), keypolicy.ErrNotUnderstood},
		"an unknown key":              {operator("StringEquals", `{"kms:ViaService":"s3.amazonaws.com"}`), keypolicy.ErrNotUnderstood},
		"a key in another case":       {replace("kms:RecipientAttestation:PCR0", "kms:recipientattestation:pcr0"), keypolicy.ErrNotUnderstood},
		"PCR32":                       {replace("PCR0", "PCR32"), keypolicy.ErrNotUnderstood},
		"PCR00":                       {replace("PCR0", "PCR00"), keypolicy.ErrNotUnderstood},
		"PCR+1":                       {replace("PCR0", "PCR+1"), keypolicy.ErrNotUnderstood},
		"a register of NitroTPM":      {replace("PCR0", "NitroTPMPCR4"), keypolicy.ErrNotUnderstood},
		"a short register":            {replace("AbAb", "Ab"), keypolicy.ErrNotUnderstood},
		"a register with a wildcard":  {operator("StringLike", strings.Replace(pcrs, "AbAb", "*", 1)), keypolicy.ErrNotUnderstood},
		"upper case where it counts":  {operator("StringEquals", pcrs), keypolicy.ErrNotUnderstood},
		"a variable":                  {operator("StringEquals", `{"aws:PrincipalAccount":"${aws:ResourceAccount}"}`), keypolicy.ErrNotUnderstood},
		"a wildcard in an ARN":        {operator("ArnLike", `{"aws:PrincipalArn":"arn:aws:iam::111122223333:role/Dev*"}`), keypolicy.ErrNotUnderstood},
		"an ARN operator on a PCR":    {operator("ArnEquals", pcrs), keypolicy.ErrNotUnderstood},
		"no case on an ARN":           {operator("StringEqualsIgnoreCase", `{"aws:PrincipalArn":"`+parent+`"}`), keypolicy.ErrNotUnderstood},
		"Null with a text":            {operator("Null", `{"kms:RecipientAttestation:PCR0":"maybe"}`), keypolicy.ErrMalformed},
		"Null with a list":            {operator("Null", `{"kms:RecipientAttestation:PCR0":["true"]}`), keypolicy.ErrMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := keypolicy.Parse([]byte(tc.text))
			if !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v\n%s", err, tc.want, tc.text)
			}
			if len(p.Statements()) > 0 {
				t.Error("a refused policy has statements")
			}
			if _, err := keypolicy.Prove([]byte(tc.text), keypolicy.Expectation{Account: account}); !errors.Is(err, tc.want) {
				t.Errorf("proved: %v", err)
			}
		})
	}
}

func TestASoundPolicyIsReadInEverySpelling(t *testing.T) {
	want := parse(t, soundPolicy())
	var pretty strings.Builder
	enc := json.NewEncoder(&pretty)
	enc.SetIndent("", "\t")
	if err := enc.Encode(tree(t, want)); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"indented":                 pretty.String(),
		"canonical":                string(want.JSON()),
		"one statement, no list":   strings.Replace(strings.Replace(soundPolicy(), `[{`, `{`, 1), `}}}]}`, `}}}}`, 1),
		"an action twice":          strings.Replace(soundPolicy(), `["kms:Decrypt"]`, `["kms:Decrypt","kms:Decrypt"]`, 1),
		"an action as text":        strings.Replace(soundPolicy(), `["kms:Decrypt"]`, `"kms:Decrypt"`, 1),
		"a resource list":          strings.Replace(soundPolicy(), `"Resource":"*"`, `"Resource":["*"]`, 1),
		"escapes":                  strings.Replace(soundPolicy(), `kms:Decrypt`, `kms:\u0044ecrypt`, 1),
		"the register in lower":    strings.ReplaceAll(soundPolicy(), "Ab", "ab"),
		"another order of members": `{"Statement":` + strings.TrimSuffix(strings.SplitN(soundPolicy(), `"Statement":`, 2)[1], "}") + `,"Version":"2012-10-17"}`,
	} {
		p := parse(t, text)
		if diff := cmp.Diff(string(want.JSON()), string(p.JSON())); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		if p.Hash() != want.Hash() {
			t.Errorf("%s: another hash", name)
		}
	}
	if parse(t, strings.Replace(soundPolicy(), "Allow", "Deny", 1)).Hash() == want.Hash() {
		t.Error("another policy has the same hash")
	}
}

func TestWhatTheCommandLinePrintsIsRead(t *testing.T) {
	want := build(t, specs(t)["two pairs"])
	quoted, err := json.Marshal(string(want.JSON()))
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{
		string(want.JSON()),
		`{"Policy": ` + string(quoted) + `}`,
		"{\n    \"Policy\": " + string(quoted) + ",\n    \"PolicyName\": \"default\"\n}\n",
	} {
		p, err := keypolicy.ParseOutput([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want.JSON()), string(p.JSON())); diff != "" {
			t.Error(diff)
		}
	}
	for _, text := range []string{
		`{"Policy":{}}`, `{"Policy":"x"}`, `{"Policy":""}`, `{"Policy":` + string(quoted) + `,"PolicyName":"other"}`,
		`{"Policy":` + string(quoted) + `,"Other":1}`, `{"Policy":` + string(quoted) + `,"Policy":""}`, `{"PolicyName":"default"}`,
		strings.Repeat(" ", 300<<10),
	} {
		if _, err := keypolicy.ParseOutput([]byte(text)); err == nil {
			t.Errorf("read: %.60s", text)
		}
	}
	if _, err := keypolicy.Parse([]byte(`{"Policy": ` + string(quoted) + `}`)); err == nil {
		t.Error("Parse reads a policy, not what a command prints")
	}
}

func TestErrorsRepeatNothingOfThePolicy(t *testing.T) {
	const marker = "tellmewhy"
	for i, text := range []string{
		strings.Replace(soundPolicy(), "Sid", marker, 1), strings.Replace(soundPolicy(), "kms:Decrypt", "kms:"+marker, 1),
		strings.Replace(soundPolicy(), "111122223333", marker, 1), strings.Replace(soundPolicy(), "StringEqualsIgnoreCase", marker, 1),
		strings.Replace(soundPolicy(), "PCR0", marker, 1), strings.Replace(soundPolicy(), "AbAb", marker, 1),
		marker, `{"` + marker + `":1}`, strings.Replace(soundPolicy(), "a b", marker, 1),
		strings.Replace(soundPolicy(), "111122223333", "arn:aws:iam::111122223333:role/"+marker, 1),
	} {
		_, err := keypolicy.Prove([]byte(text), keypolicy.Expectation{Account: account, Exact: true})
		if err == nil || strings.Contains(err.Error(), marker) {
			t.Errorf("%d: %v", i, err)
		}
	}
}

func TestAPolicyThatNamesTooMuchIsRefused(t *testing.T) {
	var who, registers []string
	for i := range 400 {
		who = append(who, fmt.Sprintf(`"arn:aws:iam::%s:role/r%d"`, account, i))
	}
	for i := range 8 {
		registers = append(registers, fmt.Sprintf(`"kms:RecipientAttestation:PCR%d":"%s"`, i, pcr(t, "ab")))
	}
	callers := policyOf(statement("Allow", `{"AWS":[`+strings.Join(who, ",")+`]}`, `"kms:Decrypt"`, ""))
	documents := policyOf(statement("Allow", `"*"`, `"kms:Decrypt"`, `{"StringEquals":{`+strings.Join(registers, ",")+`}}`))
	for _, text := range []string{callers, documents} {
		if _, err := keypolicy.Prove([]byte(text), keypolicy.Expectation{Account: account}); !errors.Is(err, keypolicy.ErrNotUnderstood) {
			t.Error(err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range specs(f) {
		f.Add(build(f, s).JSON())
	}
	f.Add([]byte(soundPolicy()))
	f.Add([]byte(policyOf(statement("Deny", `{"AWS":["*"],"Service":"ec2.amazonaws.com"}`, `"*"`, `{"Null":{"aws:PrincipalArn":true}}`))))
	f.Fuzz(func(t *testing.T, raw []byte) {
		p, err := keypolicy.Parse(raw)
		if err != nil {
			if !errors.Is(err, keypolicy.ErrMalformed) && !errors.Is(err, keypolicy.ErrNotUnderstood) {
				t.Fatal(err)
			}
			return
		}
		text := p.JSON()
		q, err := keypolicy.Parse(text)
		if err != nil {
			if len(text) > 32<<10 {
				return // the canonical layout can be longer than the quota
			}
			t.Fatalf("what was read is not read again: %v\n%s", err, text)
		}
		if again := q.JSON(); string(again) != string(text) {
			t.Fatalf("not canonical: %s", cmp.Diff(string(text), string(again)))
		}
	})
}

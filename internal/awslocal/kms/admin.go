package kms

import (
	"errors"
	"fmt"
	"strings"
)

type createKeyInput struct {
	Policy                         string
	Description                    string
	KeySpec, KeyUsage, Origin      string
	MultiRegion                    bool
	BypassPolicyLockoutSafetyCheck bool
}

// emulated refuses every key but the default one: symmetric, made by KMS.
func (in *createKeyInput) emulated() bool {
	return !in.MultiRegion &&
		(in.KeySpec == "" || in.KeySpec == "SYMMETRIC_DEFAULT") &&
		(in.KeyUsage == "" || in.KeyUsage == "ENCRYPT_DECRYPT") &&
		(in.Origin == "" || in.Origin == "AWS_KMS")
}

func (s *Server) createKey(principal string, body []byte) (any, *apiError) {
	var in createKeyInput
	if apiErr := decode(body, &in); apiErr != nil {
		return nil, apiErr
	}
	if !in.emulated() {
		return nil, refuse("UnsupportedOperationException", "the local KMS makes symmetric single-Region keys only")
	}
	if accountOf(principal) != s.opt.Account {
		return nil, denied(principal, "kms:CreateKey", "*", string(implicitDeny))
	}
	id := newID()
	text := in.Policy
	if text == "" {
		text = s.rootPolicy()
	}
	parsed, apiErr := s.acceptPolicy(id, text, principal, in.BypassPolicyLockoutSafetyCheck)
	if apiErr != nil {
		return nil, apiErr
	}
	k, err := s.addKey(id, text, in.Description, parsed)
	if err != nil {
		return nil, refuse("KMSInternalException", "")
	}
	return map[string]any{"KeyMetadata": s.metadata(k)}, nil
}

// rootPolicy is what AWS gives a key that is made without a policy.
func (s *Server) rootPolicy() string {
	return `{"Version":"2012-10-17","Id":"key-default-1","Statement":[{"Sid":"Enable IAM User Permissions","Effect":"Allow","Principal":{"AWS":"` +
		s.rootARN() + `"},"Action":"kms:*","Resource":"*"}]}`
}

// acceptPolicy parses a policy and, unless told otherwise, makes sure that the
// caller does not lock itself out.
func (s *Server) acceptPolicy(id, text, principal string, bypass bool) (keyPolicy, *apiError) {
	parsed, err := parsePolicy([]byte(text), s.keyARN(id))
	if err != nil {
		return keyPolicy{}, refuse("MalformedPolicyDocumentException", err.Error())
	}
	if bypass {
		return parsed, nil
	}
	context := map[string]string{
		"aws:principalarn": principal, "aws:principalaccount": accountOf(principal), "kms:calleraccount": accountOf(principal),
	}
	if parsed.decide(access{principal: principal, action: "kms:PutKeyPolicy", context: context}) != allowed {
		return keyPolicy{}, refuse("MalformedPolicyDocumentException",
			"The new key policy will not allow you to update the key policy in the future.")
	}
	return parsed, nil
}

func (s *Server) addKey(id, text, description string, parsed keyPolicy) (key, error) {
	k := key{
		ID: id, Created: s.opt.Now().UTC(), Enabled: true, Description: description,
		Secret: newSecret(), Policy: text, parsed: parsed, Facts: PlainFacts(),
	}
	if err := s.keys.add(k); err != nil {
		return key{}, err
	}
	return k, nil
}

func (s *Server) metadata(k key) map[string]any {
	state := "Enabled"
	if !k.Enabled {
		state = "Disabled"
	}
	return map[string]any{
		"AWSAccountId":          s.opt.Account,
		"Arn":                   s.keyARN(k.ID),
		"KeyId":                 k.ID,
		"CreationDate":          float64(k.Created.UnixMilli()) / 1000,
		"Description":           k.Description,
		"Enabled":               k.Enabled,
		"KeyState":              state,
		"KeyManager":            "CUSTOMER",
		"KeySpec":               k.Facts.KeySpec,
		"CustomerMasterKeySpec": k.Facts.KeySpec,
		"KeyUsage":              k.Facts.KeyUsage,
		"EncryptionAlgorithms":  []string{"SYMMETRIC_DEFAULT"},
		"Origin":                k.Facts.Origin,
		"MultiRegion":           k.Facts.MultiRegion,
	}
}

// administer finds a key and asks its policy for an action without context.
func (s *Server) administer(keyID, principal, action string) (key, *apiError) {
	k, apiErr := s.find(keyID)
	if apiErr != nil {
		return key{}, apiErr
	}
	return k, s.authorize(k, principal, action, nil, nil)
}

func (s *Server) describeKey(principal string, body []byte) (any, *apiError) {
	var in struct {
		KeyID string `json:"KeyId"`
	}
	if apiErr := decode(body, &in); apiErr != nil {
		return nil, apiErr
	}
	k, apiErr := s.administer(in.KeyID, principal, "kms:DescribeKey")
	if apiErr != nil {
		return nil, apiErr
	}
	return map[string]any{"KeyMetadata": s.metadata(k)}, nil
}

// policyName is the only one that KMS knows.
const policyName = "default"

func (s *Server) getKeyPolicy(principal string, body []byte) (any, *apiError) {
	var in struct {
		KeyID      string `json:"KeyId"`
		PolicyName string
	}
	if apiErr := decode(body, &in); apiErr != nil {
		return nil, apiErr
	}
	k, apiErr := s.administer(in.KeyID, principal, "kms:GetKeyPolicy")
	if apiErr != nil {
		return nil, apiErr
	}
	if in.PolicyName != "" && in.PolicyName != policyName {
		return nil, refuse("NotFoundException", "No such policy exists")
	}
	return map[string]any{"Policy": k.Policy, "PolicyName": policyName}, nil
}

func (s *Server) putKeyPolicy(principal string, body []byte) (any, *apiError) {
	var in struct {
		KeyID                          string `json:"KeyId"`
		PolicyName                     string
		Policy                         string
		BypassPolicyLockoutSafetyCheck bool
	}
	if apiErr := decode(body, &in); apiErr != nil {
		return nil, apiErr
	}
	k, apiErr := s.administer(in.KeyID, principal, "kms:PutKeyPolicy")
	if apiErr != nil {
		return nil, apiErr
	}
	if in.PolicyName != "" && in.PolicyName != policyName {
		return nil, invalid("PolicyName must be default")
	}
	parsed, apiErr := s.acceptPolicy(k.ID, in.Policy, principal, in.BypassPolicyLockoutSafetyCheck)
	if apiErr != nil {
		return nil, apiErr
	}
	if err := s.keys.update(k.ID, func(k *key) { k.Policy, k.parsed = in.Policy, parsed }); err != nil {
		return nil, refuse("KMSInternalException", "")
	}
	return struct{}{}, nil
}

// emptyPage is where the listing of grants begins: AWS may answer a page that is
// empty and not the last.
const emptyPage = "page-0"

// listGrants answers an empty page and then those of Facts. CreateGrant is not
// emulated.
func (s *Server) listGrants(principal string, body []byte) (any, *apiError) {
	var in struct {
		KeyID  string `json:"KeyId"`
		Limit  *int
		Marker string
	}
	if apiErr := decode(body, &in); apiErr != nil {
		return nil, apiErr
	}
	k, apiErr := s.administer(in.KeyID, principal, "kms:ListGrants")
	if apiErr != nil {
		return nil, apiErr
	}
	if in.Marker == "" && k.Facts.Grants > 0 {
		return map[string]any{"Grants": []any{}, "Truncated": true, "NextMarker": emptyPage}, nil
	}
	limit, from := 50, 0 // the default of AWS
	if in.Limit != nil {
		limit = *in.Limit
	}
	if in.Marker != "" {
		if _, err := fmt.Sscanf(in.Marker, "page-%d", &from); err != nil || from < 0 || from > k.Facts.Grants {
			return nil, refuse("InvalidMarkerException", "the marker is not one of this listing")
		}
	}
	if limit < 1 || limit > 100 {
		return nil, invalid("Limit must be 1 to 100")
	}
	to := min(from+limit, k.Facts.Grants)
	grants := []any{}
	for n := from; n < to; n++ {
		grants = append(grants, map[string]any{
			"KeyId": s.keyARN(k.ID), "GrantId": fmt.Sprintf("%064x", n+1), "GranteePrincipal": s.rootARN(), "Operations": []string{"Decrypt"},
		})
	}
	out := map[string]any{"Grants": grants, "Truncated": to < k.Facts.Grants}
	if to < k.Facts.Grants {
		out["NextMarker"] = fmt.Sprintf("page-%d", to)
	}
	return out, nil
}

var errNoKey = errors.New("no such key")

// CreateKey makes a key as the account's root, without a request. An empty
// policy lets the root do everything and nobody else anything.
func (s *Server) CreateKey(policy []byte) (arn string, err error) {
	text := string(policy)
	if text == "" {
		text = s.rootPolicy()
	}
	id := newID()
	parsed, err := parsePolicy([]byte(text), s.keyARN(id))
	if err != nil {
		return "", fmt.Errorf("create a key: %w", err)
	}
	if _, err := s.addKey(id, text, "", parsed); err != nil {
		return "", fmt.Errorf("create a key: %w", err)
	}
	return s.keyARN(id), nil
}

// PutKeyPolicy replaces a policy as the account's root, without a request and
// whatever the old policy says.
func (s *Server) PutKeyPolicy(arn string, policy []byte) error {
	parsed, err := parsePolicy(policy, arn)
	if err != nil {
		return fmt.Errorf("put a key policy: %w", err)
	}
	return s.change(arn, func(k *key) { k.Policy, k.parsed = string(policy), parsed })
}

// SetEnabled enables or disables a key.
func (s *Server) SetEnabled(arn string, enabled bool) error {
	return s.change(arn, func(k *key) { k.Enabled = enabled })
}

// SetFacts changes what cannot be changed of a key in AWS, or only by calls that
// are not emulated: tests show what such a key is refused for.
func (s *Server) SetFacts(arn string, f Facts) error {
	return s.change(arn, func(k *key) { k.Facts = f })
}

func (s *Server) change(arn string, f func(*key)) error {
	id, ok := strings.CutPrefix(arn, s.arnPrefix())
	if _, found := s.keys.get(id); !ok || !found {
		return errNoKey
	}
	return s.keys.update(id, f)
}

package kms

import (
	"encoding/json"
	"net/http"
)

// apiError is an answer of KMS that is no success. AWS's KMS answers status 400
// to every fault of a caller, as JSON 1.1 services do, and 500 to its own.
type apiError struct {
	Type    string `json:"__type"`
	Message string `json:"message"`
}

func (e *apiError) Error() string { return e.Type + ": " + e.Message }

func (e *apiError) status() int {
	if e.Type == "KMSInternalException" {
		return http.StatusInternalServerError
	}
	return http.StatusBadRequest
}

func refuse(kind, message string) *apiError { return &apiError{Type: kind, Message: message} }

func invalid(message string) *apiError { return refuse("ValidationException", message) }

func denied(principal, action, resource, why string) *apiError {
	return refuse("AccessDeniedException", "User: "+principal+" is not authorized to perform: "+action+" on resource: "+resource+" "+why)
}

const contentType = "application/x-amz-json-1.1"

// write sends v as the answer. A connection that fails here fails the caller too.
func write(w http.ResponseWriter, status int, v any) {
	body, err := json.Marshal(v)
	if err != nil { // no type here can fail
		status, body = http.StatusInternalServerError, []byte(`{"__type":"KMSInternalException"}`)
	}
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(status)
	_, _ = w.Write(body)
}

// Package reaches imports the AWS SDK through internal/awshttp, so that a test can see that it is seen.
package reaches

import "github.com/keyhold/keyhold/internal/awshttp"

// Client keeps the import.
type Client = awshttp.Client

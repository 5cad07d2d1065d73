// LayerNorm(residual + dropout(x + x_bias)) * weight + bias and its gradients, in float32, behind a C interface.
//
// The dropout mask is that of kernels/_common/philox.py: Philox4x32 with 7 rounds, one byte an element.

#include <cmath>
#include <cstdint>
#include <vector>

namespace {

struct Dropout {
    uint64_t seed, offset;
    int32_t threshold;  // byte values below it drop an element; 0 for no dropout

    // The multiplier of each column of a row.
    void row(int64_t row, int64_t columns, float* out) const {
        const float scale = 256.0f / static_cast<float>(256 - threshold);
        for (int64_t first = 0; first < columns; first += 16) {
            uint32_t c[4] = {uint32_t(first / 16), uint32_t(row), 0, uint32_t(offset)};
            uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
            for (int round = 0; round < 7; ++round) {
                const uint64_t a = uint64_t(c[0]) * 0xD2511F53u, b = uint64_t(c[2]) * 0xCD9E8D57u;
                const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ key[0], uint32_t(b),
                                          uint32_t(a >> 32) ^ c[3] ^ key[1], uint32_t(a)};
                for (int i = 0; i < 4; ++i) c[i] = next[i];
                key[0] += 0x9E3779B9u;
                key[1] += 0xBB67AE85u;
            }
            for (int64_t column = first; column < columns && column < first + 16; ++column) {
                const int64_t i = column - first;
                const int32_t byte = (c[i / 4] >> (8 * (i % 4))) & 255;
                out[column] = byte >= threshold ? scale : 0.0f;
            }
        }
    }
};

}  // namespace

extern "C" {

// x_bias may be null. normed, rstd and multiplier are for the backward pass: (rows, columns), (rows,), (rows, columns).
void forward(const float* x, const float* residual, const float* weight, const float* bias, const float* x_bias,
             int64_t rows, int64_t columns, float eps, uint64_t seed, uint64_t offset, int32_t threshold, float* out,
             float* normed, float* rstd, float* multiplier) {
    const Dropout dropout{seed, offset, threshold};
    for (int64_t t = 0; t < rows; ++t) {
        float* m = multiplier + t * columns;
        float* n = normed + t * columns;
        if (threshold) {
            dropout.row(t, columns, m);
        } else {
            for (int64_t e = 0; e < columns; ++e) m[e] = 1.0f;
        }
        double sum = 0.0, squares = 0.0;
        for (int64_t e = 0; e < columns; ++e) {
            const float shifted = x[t * columns + e] + (x_bias ? x_bias[e] : 0.0f);
            n[e] = residual[t * columns + e] + shifted * m[e];
            sum += n[e];
        }
        const double mean = sum / static_cast<double>(columns);
        for (int64_t e = 0; e < columns; ++e) squares += (n[e] - mean) * (n[e] - mean);
        rstd[t] = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(columns) + eps));
        for (int64_t e = 0; e < columns; ++e) {
            n[e] = static_cast<float>((n[e] - mean) * rstd[t]);
            out[t * columns + e] = n[e] * weight[e] + bias[e];
        }
    }
}

// dweight, dbias and dx_bias are zeros on entry, in double, of (columns,).
void backward(const float* dout, const float* weight, const float* normed, const float* rstd, const float* multiplier,
              int64_t rows, int64_t columns, float* dx, float* dresidual, double* dweight, double* dbias,
              double* dx_bias) {
    for (int64_t t = 0; t < rows; ++t) {
        const int64_t row = t * columns;
        double sum = 0.0, product = 0.0;
        for (int64_t e = 0; e < columns; ++e) {
            const double g = static_cast<double>(dout[row + e]) * weight[e];
            sum += g;
            product += g * normed[row + e];
            dweight[e] += static_cast<double>(dout[row + e]) * normed[row + e];
            dbias[e] += dout[row + e];
        }
        for (int64_t e = 0; e < columns; ++e) {
            const double g = static_cast<double>(dout[row + e]) * weight[e];
            const double mean = (sum + normed[row + e] * product) / static_cast<double>(columns);
            dresidual[row + e] = static_cast<float>(rstd[t] * (g - mean));
            dx[row + e] = dresidual[row + e] * multiplier[row + e];
            dx_bias[e] += dx[row + e];
        }
    }
}
}

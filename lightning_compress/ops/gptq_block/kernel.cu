// One block of GPTQ's columns for all rows: one thread per row, PANEL columns at a time in registers.
//
//     a_j = A_j + sum_{k<j} d_k U_kj,   q_j = the grid point nearest to a_j, 0 where keep is 0,   d_j = w_j - q_j
//
// A, W, Q and D are [b, R], so that threads of a warp read neighbours. The errors of earlier panels are added to a column
// when it is read (errors are stored in shared memory, one column of it for each thread); within a panel each error is
// added to the later columns at once. So the code has the length of one panel: all 128 columns unrolled would be 8128
// consecutive multiply-adds.
//
// Compiled by NVRTC without headers; FORMAT, ZERO, KEEP, BF16, FP16, MANTISSA and EXPONENT are defined by -D. On a CPU
// (see the tests) the macros below are replaced, since they use features that only a GPU has. Multiplications and additions must not be contracted
// (--fmad=false): rounding follows compressed-tensors operation by operation.

#if ZERO
#define PANEL 16
#else
#define PANEL 32
#endif
#define THREADS 64

#ifndef ON_CPU
#define COPY_16_BYTES(to, from) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" \
    :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory")
#define COMMIT asm volatile("cp.async.commit_group;" ::: "memory")
#define WAIT_FOR_ALL_BUT(groups) asm volatile("cp.async.wait_group %0;" :: "n"(groups) : "memory")
#define STORE_IF(condition, to, value) asm volatile( \
    "{ .reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.f32 [%1], %2; }" \
    :: "r"((int)(condition)), "l"(to), "f"(value) : "memory")          // without a branch, and without delay
#define BITS(x) __float_as_uint(x)
#define FROM_BITS(u) __uint_as_float(u)
__device__ __forceinline__ float reciprocal(float x) {                 // off by one unit in the last place at most
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

// a / s, correctly rounded, s in [2^-149, 2^127). The compiler's division branches, and no instruction is moved past it.
// Scaling s into [1, 2) by a power of two makes branches unnecessary.
__device__ __forceinline__ float quotient(float a, float s) {
    const float power = FROM_BITS(0x7f000000 - (BITS(s) & 0x7f800000));
    a *= power;
    s *= power;
    float y = reciprocal(s);
    y = fmaf(y, fmaf(-s, y, 1.0f), y);
    const float first = a * y;
    const float second = fmaf(y, fmaf(-s, first, a), first);
    const float third = fmaf(y, fmaf(-s, second, a), second);
    return fabsf(first) < 1073741824.0f ? third : first;               // clamped later; infinite ones would become NaN
}

#if FORMAT == 2
// The nearest number of a format with MANTISSA bits and a least EXPONENT, ties to even; |v| is within its range.
__device__ __forceinline__ float to_float(float v) {
    int exponent = max((int)(BITS(v) >> 23 & 255) - 127, EXPONENT) - MANTISSA;
    return rintf(v * FROM_BITS((127 - exponent) << 23)) * FROM_BITS((127 + exponent) << 23);
}
#endif

#if BF16
__device__ __forceinline__ float to_bf16(float v) {
    unsigned u = BITS(v);
    return v != v ? v : FROM_BITS((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000);
}
#endif

#if FP16
__device__ __forceinline__ float to_fp16(float v) {
    int exponent = max((int)(BITS(v) >> 23 & 255) - 127, -14) - 10;
    float rounded = rintf(v * FROM_BITS((127 - exponent) << 23)) * FROM_BITS((127 + exponent) << 23);
    return fabsf(rounded) > 65504.0f ? copysignf(FROM_BITS(0x7f800000), v) : rounded;
}
#endif

#if FORMAT
// NaN stays NaN, as in torch.clamp.
__device__ __forceinline__ float clamp(float v, float low, float high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

__device__ __forceinline__ float nearest(float a, float s, float z, float low, float high) {
    float v = quotient(a, s);
#if FORMAT == 2
    v = to_float(clamp(v, low, high));
#elif ZERO
    v = clamp(rintf(v + z), low, high) - z;
#else
    v = clamp(rintf(v), low, high);
#endif
    v = v * s;
#if BF16
    v = to_bf16(v);
#endif
#if FP16
    v = to_fp16(v);
#endif
    return v;
}
#endif

// U is [p, p] with a row stride of stride_u, p being b rounded up to a multiple of PANEL, padded with zeros; its rows begin
// at multiples of 16 bytes. S and Z are [G, R], group [b]. Shared memory: p * p + p * THREADS floats.
extern "C" __global__ void __launch_bounds__(THREADS) gptq_block(
    float* __restrict__ A, float* __restrict__ Q, float* __restrict__ D, const float* __restrict__ W,
    const float* __restrict__ U, const float* __restrict__ S, const float* __restrict__ Z,
    const int* __restrict__ group, const unsigned char* __restrict__ keep,
    int R, int b, int stride_u, float low, float high
) {
    extern __shared__ __align__(16) float shared[];
    const int p = (b + PANEL - 1) / PANEL * PANEL;
    const int row = blockIdx.x * THREADS + threadIdx.x;
    const bool inside = row < R;
    const unsigned r = inside ? row : R - 1;
    const unsigned stride = R;
    float* errors = shared + p * p + threadIdx.x;

    // Rows of U, from the columns of their panel on. The rows of the first panel are a group that can be awaited alone.
    for (int j = threadIdx.x / 32; j < p; j += THREADS / 32) {
        for (int k = j / PANEL * PANEL + threadIdx.x % 32 * 4; k < p; k += 128)
            COPY_16_BYTES(shared + j * p + k, U + (long long)j * stride_u + k);
        if (j / PANEL == 0 && j + THREADS / 32 >= PANEL) COMMIT;
    }
    COMMIT;

    #pragma unroll 1
    for (int j0 = 0; j0 < b; j0 += PANEL) {
#if KEEP
        unsigned mask = 0;                                              // a bit for each column
        #pragma unroll
        for (int j = 0; j < PANEL; ++j) mask |= (unsigned)keep[min(j0 + j, b - 1) * stride + r] << j;
#endif
        // All loads of the panel start here, and errors of earlier panels are summed while they are in flight. Past the
        // last column the last one is read again: its results reach no other column and are not stored.
        float a[PANEL], sum[PANEL], w[PANEL];
        #pragma unroll
        for (int j = 0; j < PANEL; ++j) {
            a[j] = A[min(j0 + j, b - 1) * stride + r];
            w[j] = W[min(j0 + j, b - 1) * stride + r];
            sum[j] = 0.0f;
        }
#if FORMAT
        float s[PANEL];
        #pragma unroll
        for (int j = 0; j < PANEL; ++j) s[j] = S[group[min(j0 + j, b - 1)] * (long long)R + r];
#endif
#if ZERO
        float z[PANEL];
        #pragma unroll
        for (int j = 0; j < PANEL; ++j) z[j] = Z[group[min(j0 + j, b - 1)] * (long long)R + r];
#endif
        if (j0 == 0) WAIT_FOR_ALL_BUT(1); else WAIT_FOR_ALL_BUT(0);
        if (j0 <= PANEL) __syncthreads();

        #pragma unroll 4
        for (int i = 0; i < j0; ++i) {
            const float d = errors[i * THREADS];
            #pragma unroll
            for (int k = 0; k < PANEL; ++k) sum[k] = fmaf(d, shared[i * p + j0 + k], sum[k]);
        }
        #pragma unroll
        for (int j = 0; j < PANEL; ++j) a[j] += sum[j];
        #pragma unroll
        for (int j = 0; j < PANEL; ++j) {
            const unsigned at = (j0 + j) * stride + r;
#if ZERO
            float q = nearest(a[j], s[j], z[j], low, high);
#elif FORMAT
            float q = nearest(a[j], s[j], 0.0f, low, high);
#else
            float q = a[j];
#endif
#if KEEP
            if (!(mask >> j & 1)) q = 0.0f;
#endif
            const float d = w[j] - q;
            errors[(j0 + j) * THREADS] = d;
            const bool valid = inside && j0 + j < b;
            STORE_IF(valid, A + at, a[j]);
            STORE_IF(valid, Q + at, q);
            STORE_IF(valid, D + at, d);
            #pragma unroll
            for (int k = j + 1; k < PANEL; ++k) a[k] = fmaf(d, shared[(j0 + j) * p + j0 + k], a[k]);
        }
    }
}
